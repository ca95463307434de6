"""The data set: annotations, run lengths, resizing, splits and the HDF5 file."""
