//! Recorded kernel messages, and any bytes at all, through the decoders.
