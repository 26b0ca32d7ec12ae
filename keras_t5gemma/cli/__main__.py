import sys

from keras_t5gemma.cli.main import main

sys.exit(main())
