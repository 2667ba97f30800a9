"""One file per model family. Each says only how it differs from the decoder they share."""
