"""The data set: annotations, run lengths, resizing, shards, the HDF5 file and splits; uses numpy and h5py.

annotations, labels, patients, rle: the tables and masks that come with the images; decoder_pool: processes
that read untrusted files; packed_image, resize, shards: files to compressed images; hdf5: the file; splits.
"""
