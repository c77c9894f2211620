"""From text to fixed-length rows of token ids: `documents` reads text, `packing` packs it once, `rows` reads it back."""
