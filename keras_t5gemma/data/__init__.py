"""Training data: file readers, data sets of pairs, documents and encoder texts.

Text becomes batches of token ids here: readers of files, the data sets that `fit` goes
through, packing and bucketing, the pretraining objectives, and files that several
processes share. The data sets can resume in the middle of an epoch. May import
`tokenization` and the layers below it; imports no losses, training or tasks.
"""
