"""Reads DICOM files and pictures from folders and archives into 8-bit grey images; uses numpy and pydicom.

archive, containers: the files and their ids; header, codecs, picture: what one file holds; radiograph: its
8-bit image; limits: memory, time and cores for reading; segmentation: masks written as DICOM.
"""
