"""The data set: annotations, run lengths, resizing, shards, the HDF5 file and splits; uses numpy and h5py.

annotations, patients, rle: the tables that come with the images; resize, packed, shards: DICOM files to
compressed images; hdf5, hdf5_writer: the data set file; splits: patient-grouped splits; decoder_pool: files.
"""
