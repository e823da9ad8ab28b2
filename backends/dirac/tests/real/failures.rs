//! Jobs that live as jobs do.
