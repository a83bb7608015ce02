"""Pictures: in memory or in their files, from folders, archives and shards; crops, augmentation, mixing, generated ones.

A data set is one function in a file of its own that returns an `ImageData` or an `ImageFiles`.
"""
