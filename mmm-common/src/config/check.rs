//! Mistakes that lie between options.
