"""From DICOM files and annotation tables to one data set file, and its division into folds."""
