//! Loading a kernel: which image comes first, and what happens when the driver refuses it.

use std::sync::OnceLock;

use halfbyte::error::{Error, Result};

use super::capability::Capability;
use super::kernels::{BUILT, Form, Image, Kernel};
use super::notice;

/// How to get kernels, for who has a build without.
pub const NO_KERNELS: &str = "this build of halfbyte has no CUDA kernels, because NVIDIA's compilers were not there when \
                              it was built: on Linux x86-64 `pip install .` in halfbyte's sources fetches them and builds \
                              anew, no CUDA toolkit is needed";

/// The variable that says which form is loaded, and no other.
const VARIABLE: &str = "HALFBYTE_KERNELS";

/// The form that the environment asks for.
///
/// # Errors
/// [`Error::Argument`] when it asks for one that there is not.
pub(super) fn asked_for() -> Result<Option<Form>> {
    match std::env::var_os(VARIABLE) {
        None => Ok(None),
        Some(text) => parse(&text.to_string_lossy()),
    }
}

pub(super) fn parse(text: &str) -> Result<Option<Form>> {
    match text {
        "" => Ok(None),
        "cubin" => Ok(Some(Form::Cubin)),
        "ptx" => Ok(Some(Form::Ptx)),
        _ => Err(Error::argument(VARIABLE, format!("{text:?}"), "\"cubin\", \"ptx\", or not set")),
    }
}

/// What the driver says of an image.
#[derive(Debug)]
pub(super) enum Refusal {
    /// It is not for this device or this driver: another one may be.
    Unfit(Error),
    /// Something else went wrong.
    Failed(Error),
}

/// Which forms of code the driver of a device is given.
#[derive(Debug)]
pub(super) struct Forms {
    /// The one that the environment asks for.
    asked: Option<Form>,
    /// Why the driver takes no cubins, once it has refused one.
    refused: OnceLock<Error>,
}

impl Forms {
    pub fn new(asked: Option<Form>) -> Self {
        Self { asked, refused: OnceLock::new() }
    }

    /// The form that is loaded, unless cubins come first and PTX when they are refused.
    pub fn only(&self) -> Option<Form> {
        self.asked.or_else(|| self.refused.get().map(|_| Form::Ptx))
    }

    /// Gives the driver no cubins from now on, and says so the first time. Not to be called with a lock held, because the
    /// listener may wait.
    pub fn refused(&self, error: Error) {
        if self.refused.set(error).is_ok()
            && let Some(error) = self.refused.get()
        {
            notice::tell(&format!(
                "the driver refuses the code that was built for this GPU, and compiles it anew, which takes a while when a \
                 kernel is first used: {error}"
            ));
        }
    }
}

/// What was loaded.
#[derive(Debug)]
pub(super) struct Loaded<M> {
    pub module: M,
    pub form: Form,
    /// Why the cubin was not.
    pub refused: Option<Error>,
}

/// Loads a kernel: its cubin, and when there is none for the device or the driver refuses it the PTX; with `only` that
/// alone. `words` names the device.
///
/// # Errors
/// [`Error::Cuda`] when there is no image for the device, none in this build, a damaged one, and in the driver's words.
pub(super) fn load<M>(
    kernel: &'static Kernel,
    capability: Capability,
    only: Option<Form>,
    words: &str,
    mut load: impl FnMut(&[u8]) -> std::result::Result<M, Refusal>,
) -> Result<Loaded<M>> {
    let fail = |problem: String| Err(Error::cuda(format!("kernel {} on {words}", kernel.name), problem));
    if !kernel.suits(capability) {
        return fail(format!("it is not for devices of compute capability {capability}"));
    }
    if !BUILT {
        return fail(NO_KERNELS.to_owned());
    }
    // Those for tests have PTX alone.
    let only = only.filter(|_| !kernel.for_tests);
    let forms = only.map_or_else(|| vec![Form::Cubin, Form::Ptx], |form| vec![form]);
    let images: Vec<(Form, &Image)> = forms
        .iter()
        .filter_map(|&form| kernel.image(form, capability).filter(|image| image.is_built()).map(|image| (form, image)))
        .collect();
    if images.is_empty() {
        return match only {
            _ if kernel.for_tests => {
                fail("it is for tests, and this build has none of those (cargo feature test-kernels)".to_owned())
            }
            Some(form) => {
                let form = form.as_str();
                fail(format!("{VARIABLE} asks for a {form}, and there is none for compute capability {capability}"))
            }
            None => fail(NO_KERNELS.to_owned()),
        };
    }
    let mut refused = None;
    for (form, image) in images {
        let code = match image.code() {
            Ok(code) => code,
            Err(why) => return fail(format!("its {} {why}", form.as_str())),
        };
        match load(code) {
            Ok(module) => return Ok(Loaded { module, form, refused }),
            Err(Refusal::Unfit(error)) if form == Form::Cubin && only.is_none() => refused = Some(error),
            Err(Refusal::Unfit(error) | Refusal::Failed(error)) => return Err(error),
        }
    }
    // Only a cubin that nothing stands behind comes here.
    refused.map_or_else(|| fail(NO_KERNELS.to_owned()), Err)
}
