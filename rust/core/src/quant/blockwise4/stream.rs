//! Copies that bypass the caches.

use crate::dtype::Element;

/// Copies `from` to `to`, which have one length, with streaming stores where the machine has them. Other threads see
/// the copy after [`finish`].
pub(super) fn copy<T: Element>(from: &[T], to: &mut [T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};

        const LINE: usize = 64;
        const LANE: usize = size_of::<__m128i>();
        assert_eq!(from.len(), to.len());
        let bytes = size_of_val(from);
        let (from, to) = (from.as_ptr().cast::<u8>(), to.as_mut_ptr().cast::<u8>());
        let head = to.align_offset(LINE).min(bytes);
        let lines = (bytes - head) / LINE;
        let tail = head + lines * LINE;
        // SAFETY: `bytes` bytes are readable at `from` and writable at `to`, and elements are plain bits. From `head`
        // on, `to` is aligned to a line. SSE2 is part of x86-64.
        unsafe {
            std::ptr::copy_nonoverlapping(from, to, head);
            for line in (head..tail).step_by(LINE) {
                for at in (line..line + LINE).step_by(LANE) {
                    _mm_stream_si128(to.add(at).cast(), _mm_loadu_si128(from.add(at).cast()));
                }
            }
            std::ptr::copy_nonoverlapping(from.add(tail), to.add(tail), bytes - tail);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    to.copy_from_slice(from);
}

/// Makes the streaming stores of this thread visible before any store that follows.
pub(super) fn finish() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
