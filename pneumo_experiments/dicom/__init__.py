"""DICOM files, in folders and zip archives, to 8-bit greys: numpy and pydicom."""
