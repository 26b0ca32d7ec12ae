from keras_t5gemma.config import StackConfig as StackConfig
from keras_t5gemma.config import T5GemmaConfig as T5GemmaConfig
from keras_t5gemma.modeling.backbone import Backbone as Backbone
