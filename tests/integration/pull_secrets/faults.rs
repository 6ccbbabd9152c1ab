//! What pull secrets do when something breaks.
