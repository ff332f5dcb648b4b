//! What launchers share.

/// Which of two kernels with the same meaning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Variant {
    /// The fastest one that takes the arguments.
    #[default]
    Fast,
    /// The plain one that defines the result: for tests.
    Reference,
}

/// The kernel's parameters, as the driver wants them: the addresses of variables. Of variables alone, because a temporary
/// value would be gone when the driver reads it.
macro_rules! parameters {
    ($($variable:ident),* $(,)?) => {
        &mut [$(std::ptr::from_ref(&$variable).cast_mut().cast::<std::ffi::c_void>()),*]
    };
}
pub(crate) use parameters;
