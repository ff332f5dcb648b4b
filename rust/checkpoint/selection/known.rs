//! The `model_type`s on which the rules agree with transformers 5.23 for every class that it can build.

/// Has the rules' answer for this `model_type` been compared with transformers'?
pub(super) fn contains(model_type: &str) -> bool {
    KNOWN.binary_search(&model_type).is_ok()
}

static KNOWN: &[&str] = &["llama"];
