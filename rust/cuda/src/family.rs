//! Unpacking the code of kernels: all that resembles each other is one LZMA2 stream (`kernels/compiler/pack.py`).

use std::io::Read as _;
use std::sync::OnceLock;

use lzma_rust2::{DICT_SIZE_MIN, Lzma2Reader};

/// The kernels of one source: as PTX for every architecture, or assembled for one GPU.
#[derive(Debug)]
pub(super) struct Family {
    /// Where its stream is in the build's, how long that is, and how long the code.
    at: usize,
    bytes: usize,
    size: usize,
    code: OnceLock<Result<Vec<u8>, String>>,
}

impl Family {
    #[allow(dead_code, reason = "a build without code has no families")]
    pub const fn new(at: usize, bytes: usize, size: usize) -> Self {
        Self { at, bytes, size, code: OnceLock::new() }
    }

    /// The code of all its kernels, unpacked when it is first asked for.
    ///
    /// It is kept: the other kernels of a source are often used soon after the first, and what a process keeps is a few MiB
    /// at most (all cubins of the largest architecture are 7), where a CUDA context takes hundreds.
    pub fn code(&self, packed: &[u8]) -> Result<&[u8], &str> {
        let code = self.code.get_or_init(|| {
            let stream = packed.get(self.at..).and_then(|rest| rest.get(..self.bytes)).ok_or("it is not there")?;
            unpack(stream, self.size)
        });
        code.as_deref().map_err(String::as_str)
    }
}

/// Unpacks a bare LZMA2 stream of `size` bytes, whose dictionary is as long as they are.
pub(super) fn unpack(stream: &[u8], size: usize) -> Result<Vec<u8>, String> {
    let dictionary = u32::try_from(size).map_err(|_| format!("{size} bytes are too many"))?.max(DICT_SIZE_MIN);
    let mut reader = Lzma2Reader::new(stream, dictionary, None);
    let mut code = vec![0; size];
    reader.read_exact(&mut code).map_err(|error| error.to_string())?;
    // Its end is part of it.
    match reader.read(&mut [0]) {
        Ok(0) if reader.inner().is_empty() => Ok(code),
        Ok(_) => Err(format!("there is more than {size} bytes")),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "0 halves of a byte\n" and so on to 11, as Python's lzma packs it with lc=4, lp=0, pb=0.
    const STREAM: &[u8] = b"\xe0\x00\xe5\x006\x04\x00\x18\x08JBe\xf0\xdd\xe6\x9d\xc3\x87\xe1?\x9fn[8\xa3\xdfG\xa7\xbd\xe1O\
                            \xa2\xb4\xd8\xa2\x01P\x015\xddi\x99`\x1a\xaa\xcb\xf08\x91Y\xb2\x8c\xb5\xeb~n\x90q\x85\xa8\x00\x00";

    fn text() -> Vec<u8> {
        (0..12).flat_map(|i| format!("{i} halves of a byte\n").into_bytes()).collect()
    }

    #[test]
    fn unpack_gives_what_was_packed() {
        assert_eq!(unpack(STREAM, text().len()), Ok(text()));
        assert_eq!(unpack(b"\0", 0), Ok(Vec::new()));
    }

    #[test]
    fn unpack_says_that_a_stream_is_cut_or_of_another_length() {
        let size = text().len();
        for cut in 0..STREAM.len() {
            assert!(unpack(&STREAM[..cut], size).is_err(), "{cut} bytes");
        }
        assert!(unpack(STREAM, size + 1).is_err());
        assert!(unpack(STREAM, size - 1).unwrap_err().contains("more than 229 bytes"));
        assert!(unpack(&[STREAM, b"\0"].concat(), size).unwrap_err().contains("more than 230 bytes"));
        assert!(unpack(STREAM, usize::MAX).unwrap_err().contains("too many"));
    }

    #[test]
    fn unpack_gives_other_bytes_or_an_error_when_any_bit_is_wrong() {
        for place in 0..STREAM.len() * 8 {
            let mut damaged = STREAM.to_vec();
            damaged[place / 8] ^= 1 << (place % 8);
            // Nothing panics; what is no error here, the checksum of each kernel finds.
            assert_ne!(unpack(&damaged, text().len()), Ok(text()), "bit {place}");
        }
    }

    #[test]
    fn family_is_unpacked_once_and_keeps_what_came_of_it() {
        let packed = [b"before", STREAM, b"behind"].concat();
        let family = Family::new(6, STREAM.len(), text().len());
        let first = family.code(&packed).unwrap();
        assert_eq!(first, text());
        assert!(std::ptr::eq(first, family.code(&[]).unwrap()));

        let absent = Family::new(20, STREAM.len(), text().len());
        assert_eq!(absent.code(&packed[..40]), Err("it is not there"));
        assert!(Family::new(usize::MAX, 1, 1).code(&packed).is_err());
    }
}
