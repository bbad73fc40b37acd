"""Tasks over served models: text generation, fill-mask, classification, question answering, translation, features."""
