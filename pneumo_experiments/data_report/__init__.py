"""What preprocess found in the data, as a page, as JSON and in lines."""
