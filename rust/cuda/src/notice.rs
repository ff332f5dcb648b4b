//! What a user should hear of though nothing failed: said to a listener, which the host language brings.

use std::sync::OnceLock;

static LISTENER: OnceLock<fn(&str)> = OnceLock::new();

/// Gives notices to `listener` from now on; the first one that is named stays. It may be called in any thread.
pub fn listen(listener: fn(&str)) {
    let _ = LISTENER.set(listener);
}

pub(super) fn tell(text: &str) {
    if let Some(listener) = LISTENER.get() {
        listener(text);
    }
}
