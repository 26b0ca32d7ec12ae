"""Encoder-decoder Gemma for Keras 3: load, fine-tune, generate."""

from typing import TYPE_CHECKING

from keras_t5gemma import environment as _environment

__version__ = _environment.VERSION

# Keras finds a serialized class only after its module was imported, so everything is
# imported here. The command line shows its help first; see `cli.commands`.
if TYPE_CHECKING or not _environment.defers_imports():
    _environment.choose_backend()

    from keras_t5gemma.checkpoints.catalog import presets as presets
    from keras_t5gemma.config import StackConfig as StackConfig
    from keras_t5gemma.config import T5GemmaConfig as T5GemmaConfig
    from keras_t5gemma.conversion.adapt import adapt_gemma2 as adapt_gemma2
    from keras_t5gemma.conversion.adapt import adapt_to_folder as adapt_to_folder
    from keras_t5gemma.conversion.average import average_presets as average_presets
    from keras_t5gemma.conversion.compare import verify as verify
    from keras_t5gemma.conversion.convert import convert as convert
    from keras_t5gemma.data import objectives as objectives
    from keras_t5gemma.data.readers import read_pairs as read_pairs
    from keras_t5gemma.data.readers import read_texts as read_texts
    from keras_t5gemma.data.sharded_files import PairFiles as PairFiles
    from keras_t5gemma.data.sharded_files import TextFiles as TextFiles
    from keras_t5gemma.distribution.distribute import distribute as distribute
    from keras_t5gemma.distribution.process_group import connect as connect
    from keras_t5gemma.evaluation.harness import evaluate_encoders as evaluate_encoders
    from keras_t5gemma.generation.engine import (
        cache_compiled_programs as cache_compiled_programs,
    )
    from keras_t5gemma.generation.options import GenerationOptions as GenerationOptions
    from keras_t5gemma.modeling.backbone import Backbone as Backbone
    from keras_t5gemma.planning.planner import plan as plan
    from keras_t5gemma.recipes.finetune import finetune as finetune
    from keras_t5gemma.recipes.pretrain import pretrain as pretrain
    from keras_t5gemma.tasks.seq2seq_lm import Seq2SeqLM as Seq2SeqLM
    from keras_t5gemma.tasks.text_classifier import TextClassifier as TextClassifier
    from keras_t5gemma.tasks.text_embedder import TextEmbedder as TextEmbedder
    from keras_t5gemma.tasks.text_tower import TextTower as TextTower
    from keras_t5gemma.tasks.vector_search import cosine_similarity as cosine_similarity
    from keras_t5gemma.tasks.vector_search import nearest as nearest
    from keras_t5gemma.tokenization.preprocessor import (
        Seq2SeqLMPreprocessor as Seq2SeqLMPreprocessor,
    )
    from keras_t5gemma.tokenization.tokenizer import Tokenizer as Tokenizer
    from keras_t5gemma.training import callbacks as callbacks
    from keras_t5gemma.training.contrastive import InfoNCE as InfoNCE
    from keras_t5gemma.training.distillation import Distillation as Distillation
    from keras_t5gemma.training.losses import TokenCrossEntropy as TokenCrossEntropy
    from keras_t5gemma.training.plots import plot_history as plot_history
    from keras_t5gemma.training.teacher_scores import TeacherScores as TeacherScores
    from keras_t5gemma.training.teacher_scores import (
        write_teacher_scores as write_teacher_scores,
    )
    from keras_t5gemma.training.text_metrics import score_texts as score_texts
