//! Every way to fail.
//!
//! A message is one line, names what was looked at (argument, file, tensor), what would have been right, and the value
//! found: `argument must be …, got …`. [`Error::kind`] sorts them for callers: the command's exit code and the Python exception.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use crate::dtype::DType;

/// The result of every fallible function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in the terms of whoever called.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has a value that is not legal.
    #[error("{argument} must be {}, got {}", line(expected), line(value))]
    Argument {
        /// The argument's name as the caller writes it.
        argument: &'static str,
        /// The value given.
        value: String,
        /// The legal values.
        expected: String,
    },
    /// A file of a checkpoint breaks its format.
    #[error("{}: {}", place(path), line(problem))]
    File {
        /// The file.
        path: PathBuf,
        /// What was found, and what was expected.
        problem: String,
    },
    /// One tensor of a checkpoint breaks its format.
    #[error("{}: tensor {}: {}", place(path), quoted(tensor), line(problem))]
    Tensor {
        /// The file that holds the tensor.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What was found, and what was expected.
        problem: String,
    },
    /// A weight to be quantized holds NaN or an infinity.
    #[error(
        "{}: tensor {}: element {index} (row-major; shape {shape:?}) must be finite, got {value}; \
         keep this tensor with a rule, or allow it with --allow-nonfinite",
        place(path),
        quoted(tensor)
    )]
    NonFinite {
        /// The file that holds the tensor.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Position in the row-major list of the tensor's values.
        index: u64,
        /// The tensor's shape.
        shape: Vec<usize>,
        /// `NaN`, `inf` or `-inf`.
        value: f32,
    },
    /// A finite value has no finite form in the dtype that it is to be written in.
    #[error(
        "{}: tensor {}: element {index} (row-major; shape {shape:?}) must be a number that {dtype} holds, got {value:e}; \
         choose a larger dtype (--dtype bfloat16 or float32)",
        place(path),
        quoted(tensor)
    )]
    TooLarge {
        /// The file that holds the tensor.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Position in the row-major list of the tensor's values.
        index: u64,
        /// The tensor's shape.
        shape: Vec<usize>,
        /// The value.
        value: f32,
        /// The dtype, as torch calls it.
        dtype: &'static str,
    },
    /// The destination cannot be used as asked.
    #[error("{}: {}", place(path), line(problem))]
    Destination {
        /// The destination folder.
        path: PathBuf,
        /// Why, and which option helps.
        problem: String,
    },
    /// The file system of the destination has too little room.
    #[error(
        "{}: the output needs {needed} bytes and the file system has {available} free: free some space, or choose another destination",
        place(path)
    )]
    NoSpace {
        /// The destination folder.
        path: PathBuf,
        /// Bytes that the output takes.
        needed: u64,
        /// Bytes that may be written.
        available: u64,
    },
    /// The operating system refused.
    #[error("{}: cannot {action}: {}", place(path), words(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried: "open", "read", …
        action: &'static str,
        /// The system's words.
        source: io::Error,
    },
    /// CUDA cannot be used, or refused.
    #[error("{subject}: {problem}")]
    Cuda {
        /// What it was about: a device, or a kernel with the shape of its launch.
        subject: String,
        /// Why, in the driver's words where it has any.
        problem: String,
    },
    /// There is no NVIDIA driver on this machine.
    #[error("CUDA is not available: the NVIDIA driver's library (libcuda) is not installed")]
    NoCudaDriver,
    /// An invariant of this crate does not hold.
    #[error("a bug in halfbyte, please report it: {}", line(words))]
    Bug {
        /// What the panic said.
        words: String,
    },
    /// The caller asked to stop.
    #[error("interrupted{}", how_far(shards))]
    Interrupted {
        /// How many output files were complete by then, and how many there were to be.
        shards: Option<(usize, usize)>,
    },
}

/// The system's words without Rust's number behind them.
fn words(error: &io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error ").map_or(text.clone(), |(words, _)| words.to_owned())
}

fn how_far(shards: &Option<(usize, usize)>) -> String {
    shards.map_or_else(String::new, |(done, total)| format!(" with {done} of {total} shards complete"))
}

/// The longest part of a message, in bytes. Names in a hostile header may be a hundred megabytes long.
const LONGEST: usize = 1000;

/// A text that may come from someone else's file, on one line that moves no cursor: control and direction characters
/// are spelled out, and the middle of a very long one is left out.
fn line(text: &str) -> Cow<'_, str> {
    let hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    let text = shorten(text);
    if !text.contains(hidden) {
        return text;
    }
    let escaped = text.chars().fold(String::new(), |mut out, c| {
        if hidden(c) {
            out.extend(c.escape_default())
        } else {
            out.push(c)
        }
        out
    });
    Cow::Owned(escaped)
}

fn shorten(text: &str) -> Cow<'_, str> {
    if text.len() <= LONGEST {
        return Cow::Borrowed(text);
    }
    let (mut head, mut tail) = (LONGEST * 2 / 3, text.len() - LONGEST / 3);
    while !text.is_char_boundary(head) {
        head -= 1;
    }
    while !text.is_char_boundary(tail) {
        tail += 1;
    }
    Cow::Owned(format!("{}…{}", &text[..head], &text[tail..]))
}

fn place(path: &Path) -> String {
    line(&path.to_string_lossy()).into_owned()
}

fn quoted(name: &str) -> String {
    format!("{:?}", shorten(name))
}

/// What an [`Error`] means to a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The call was wrong: an option, an argument, a destination in use.
    Usage,
    /// The input is wrong: a broken or unsuitable checkpoint.
    Input,
    /// The machine said no: permissions, disk, memory.
    System,
    /// The GPU or its driver said no.
    Gpu,
    /// Stopped on request.
    Interrupted,
    /// A mistake of ours.
    Bug,
}

impl Error {
    /// An illegal argument.
    pub fn argument(argument: &'static str, value: impl ToString, expected: impl Into<String>) -> Self {
        Self::Argument { argument, value: value.to_string(), expected: expected.into() }
    }

    /// A tensor whose dtype is called `found`, and is none of `legal`.
    pub fn dtype(argument: &'static str, found: impl ToString, legal: &[DType]) -> Self {
        let legal: Vec<_> = legal.iter().map(|dtype| dtype.as_str()).collect();
        Self::argument(argument, found, format!("of dtype {}", legal.join(" or ")))
    }

    /// A file that breaks its format.
    pub fn file(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Self::File { path: path.as_ref().to_path_buf(), problem: problem.into() }
    }

    /// A tensor that breaks its format.
    pub fn tensor(path: impl AsRef<Path>, tensor: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Tensor { path: path.as_ref().to_path_buf(), tensor: tensor.into(), problem: problem.into() }
    }

    /// A destination that cannot be used as asked.
    pub fn destination(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Self::Destination { path: path.as_ref().to_path_buf(), problem: problem.into() }
    }

    /// A refusal of CUDA.
    pub fn cuda(subject: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Cuda { subject: subject.into(), problem: problem.into() }
    }

    /// The operating system's refusal, with the file and the action.
    pub fn io(path: impl AsRef<Path>, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, action, source }
    }

    /// What this failure means to the caller.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Argument { .. } | Self::Destination { .. } => ErrorKind::Usage,
            Self::File { .. } | Self::Tensor { .. } | Self::NonFinite { .. } | Self::TooLarge { .. } => {
                ErrorKind::Input
            }
            Self::NoSpace { .. } | Self::Io { .. } => ErrorKind::System,
            Self::Cuda { .. } | Self::NoCudaDriver => ErrorKind::Gpu,
            Self::Bug { .. } => ErrorKind::Bug,
            Self::Interrupted { .. } => ErrorKind::Interrupted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_one_short_line() {
        let bad = "a\nb\u{1b}[31m\u{202e}\u{2028}é".to_owned();
        let long = "é\n".repeat(1 << 20);
        for text in [bad, long] {
            let path = PathBuf::from(&text);
            for error in [
                Error::argument("dtype", &text, text.clone()),
                Error::file(&path, text.clone()),
                Error::tensor(&path, text.clone(), text.clone()),
                Error::destination(&path, text.clone()),
                Error::io(&path, "open")(io::ErrorKind::NotFound.into()),
                Error::NoSpace { path: path.clone(), needed: 1, available: 0 },
                Error::Bug { words: text.clone() },
                Error::NonFinite { path, tensor: text.clone(), index: 0, shape: vec![1], value: f32::NAN },
            ] {
                let message = error.to_string();
                assert!(
                    !message.contains(|c: char| c.is_control() || c == '\u{202e}' || c == '\u{2028}'),
                    "{message:?}"
                );
                assert!(message.len() < 6 * LONGEST, "{} bytes", message.len());
                assert!(message.contains('é'), "what can be printed is");
            }
        }
    }
}
