"""From text to fixed-length rows of token ids: `documents` reads, `packing` writes, `rows` reads back."""

from minitron.data.boundaries import DocumentBoundaries
from minitron.data.documents import Document, check_chat_template, check_first_row, documents
from minitron.data.fields import ends_inside_chats
from minitron.data.in_parts import InParts
from minitron.data.packing import pack, tokenizer_identity
from minitron.data.rows import Rows, Split, rows_for_step, rows_of_steps
from minitron.data.source_files import source_identity
from minitron.data.sources import TextSource
from minitron.data.special_tokens import DocumentTokens, document_tokens

__all__ = [
    "Document",
    "DocumentBoundaries",
    "DocumentTokens",
    "InParts",
    "Rows",
    "Split",
    "TextSource",
    "check_chat_template",
    "check_first_row",
    "document_tokens",
    "documents",
    "ends_inside_chats",
    "pack",
    "rows_for_step",
    "rows_of_steps",
    "source_identity",
    "tokenizer_identity",
]
