"""Training data: file readers, data sets of pairs, documents and encoder texts.

Text becomes batches of token ids here: readers of files, the data sets that `fit` goes
through, packing and bucketing, the pretraining objectives, and files that several
processes share. Every data set can resume in the middle of an epoch. May import
`tokenization` and the layers below it; knows nothing of losses, training or tasks.
"""
