"""From text to fixed-length rows of token ids: `documents` reads, `packing` writes, `rows` reads back."""
