//! What to do about a destination that holds something.

use crate::error::{Error, Result};

/// What to do about a destination that holds something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It must be new or empty.
    New,
    /// Its checkpoint is replaced when the new one is complete.
    Overwrite,
    /// An interrupted run goes on.
    Resume,
}

impl std::str::FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "new" => Ok(Self::New),
            "overwrite" => Ok(Self::Overwrite),
            "resume" => Ok(Self::Resume),
            _ => Err(Error::argument("mode", format!("{text:?}"), "new, overwrite or resume")),
        }
    }
}
