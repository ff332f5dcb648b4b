//! Against the golden vectors, and every path against the scalar definition.

mod golden;
mod paths;
