"""Synthetic chest radiographs with pneumothorax, in the layout of the SIIM-ACR data; numpy, Pillow, pydicom.

anatomy: the geometry of a chest; radiographs: the image and its masks; kaggle_layout: the files.
"""
