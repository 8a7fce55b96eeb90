"""What the model will see, for people: rows of the prepared data with what is learned, read and dropped of them."""
