"""Reads DICOM files from folders and zip archives into 8-bit grayscale images; uses numpy and pydicom.

archive: the files; header, frames, codecs: one file's metadata and pixel data; radiograph: the 8-bit image;
limits, workers: memory, time and processes for reading.
"""
