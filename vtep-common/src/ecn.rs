//! ecn
