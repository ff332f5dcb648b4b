//! What can be tested without a GPU: the kernels' tables, which image a device gets, and what happens when it is refused.

use std::sync::Mutex;

use halfbyte::codebook::{FP4_THRESHOLDS, NF4_THRESHOLDS, QuantType, dynamic_map};
use halfbyte::error::{Error, Result};

use super::capability::Capability;
use super::kernels::{self, ALL, BUILT, Form, Image, Kernel};
use super::modules::{Forms, Loaded, NO_KERNELS, Refusal, load, parse};
use super::notice;

const TABLES: &str = include_str!("../../../kernels/common/tables.cuh");
const HOPPER: Capability = Capability(9, 0);

/// The literals of the table with this name.
fn table(name: &str) -> Vec<u32> {
    let start = TABLES.find(&format!(" {name}[")).unwrap();
    let body = &TABLES[start..];
    let body = &body[body.find('=').unwrap()..body.find(';').unwrap()];
    body.split(|c: char| !(c.is_ascii_digit() || "+-.ef".contains(c)))
        .filter(|literal| !literal.is_empty())
        .map(|literal| literal.strip_suffix('f').unwrap().parse::<f32>().unwrap().to_bits())
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn the_kernels_have_the_tables_of_the_codebook() {
    let values: Vec<f32> = [QuantType::Nf4, QuantType::Fp4].iter().flat_map(|t| *t.values()).collect();
    assert_eq!(table("VALUES"), bits(&values));
    assert_eq!(table("NF4_THRESHOLDS"), bits(&NF4_THRESHOLDS));
    assert_eq!(table("FP4_THRESHOLDS"), bits(&FP4_THRESHOLDS));
    assert_eq!(table("DYNAMIC_MAP"), bits(dynamic_map()));
}

fn architecture(kernel: &'static Kernel, form: Form, device: Capability) -> Option<String> {
    kernel.image(form, device).map(Image::architecture)
}

#[test]
fn a_device_gets_the_newest_image_that_it_takes() {
    for (kernel, device, cubin, ptx) in [
        (&kernels::DEQUANTIZE_BLOCKWISE4_BF16, Capability(7, 0), None, None),
        (&kernels::DEQUANTIZE_BLOCKWISE4_BF16, Capability(7, 5), Some("sm_75"), Some("sm_75")),
        (&kernels::DEQUANTIZE_BLOCKWISE4_BF16, Capability(8, 0), Some("sm_80"), Some("sm_80")),
        (&kernels::DEQUANTIZE_BLOCKWISE4_BF16, Capability(8, 9), Some("sm_80"), Some("sm_80")),
        (&kernels::DEQUANTIZE_BLOCKWISE4_BF16, HOPPER, Some("sm_90"), Some("sm_80")),
        (&kernels::DEQUANTIZE_BLOCKWISE4_BF16, Capability(10, 3), Some("sm_100"), Some("sm_80")),
        // A card of the future, and one between two for which there are cubins.
        (&kernels::DEQUANTIZE_BLOCKWISE4_BF16, Capability(11, 0), None, Some("sm_80")),
        (&kernels::DEQUANTIZE_BLOCKWISE4_BF16, Capability(12, 1), Some("sm_120"), Some("sm_80")),
        (&kernels::QUANTIZE_BLOCKWISE4_BF16_NF4, Capability(8, 6), Some("sm_80"), Some("sm_75")),
        (&kernels::QUANTIZE_BLOCKWISE4_BF16_NF4, Capability(12, 0), Some("sm_120"), Some("sm_90")),
        (&kernels::GEMM_4BIT_SMALL_M_SM80_BF16_8, Capability(7, 5), None, None),
        (&kernels::GEMM_4BIT_SMALL_M_SM90_BF16_8, Capability(8, 9), None, None),
        // Its code is for one capability alone.
        (&kernels::GEMM_4BIT_TILE_SM90A_BF16_64, HOPPER, Some("sm_90a"), Some("sm_90a")),
        (&kernels::GEMM_4BIT_TILE_SM90A_BF16_64, Capability(10, 0), None, None),
        (&kernels::GEMM_4BIT_TILE_SM90A_BF16_64, Capability(8, 0), None, None),
    ] {
        let words = format!("{} on {device}", kernel.name);
        assert_eq!(architecture(kernel, Form::Cubin, device).as_deref(), cubin, "{words}");
        assert_eq!(architecture(kernel, Form::Ptx, device).as_deref(), ptx, "{words}");
        assert_eq!(kernel.suits(device), ptx.is_some(), "{words}");
    }
}

#[test]
fn every_kernel_that_is_shipped_has_code_for_every_gpu_that_it_is_for() {
    for (index, kernel) in ALL.iter().enumerate() {
        assert_eq!(kernel.index, index, "{}", kernel.name);
        assert!(kernel.suits(HOPPER) && kernel.threads.is_multiple_of(32), "{}", kernel.name);
        // Those for tests are built for them alone.
        let has_code = BUILT && (!kernel.for_tests || cfg!(feature = "test-kernels"));
        assert_eq!(kernel.is_built(), has_code, "{}", kernel.name);
        if !has_code {
            continue;
        }
        let ptx = kernel.image(Form::Ptx, HOPPER).unwrap().code().unwrap();
        let text = std::str::from_utf8(ptx).unwrap();
        assert!(text.starts_with(".version 8.0\n") && text.ends_with("}\n\0"), "{}", kernel.name);
        assert_eq!(text.matches(".entry").count(), 1, "{}", kernel.name);
        assert!(text.contains(&format!(".entry {}(", kernel.name)), "{}", kernel.name);
        // Each is what the compiler gave: its checksum was made of that.
        for (form, images) in [(Form::Ptx, kernel.ptx), (Form::Cubin, kernel.cubins)] {
            for image in images.iter().filter(|image| image.is_built()) {
                let words = format!("{} as {} for {}", kernel.name, form.as_str(), image.architecture());
                let code = image.code().unwrap_or_else(|why| panic!("{words}: {why}"));
                assert_eq!(code.starts_with(b"\x7fELF"), form == Form::Cubin, "{words}");
                assert_eq!(code.starts_with(b".version 8.0\n"), form == Form::Ptx, "{words}");
            }
        }
        // A build for the GPUs of this machine has other cubins, or none.
        if !kernel.for_tests && option_env!("HALFBYTE_CUBINS").unwrap_or("all") == "all" {
            assert!(kernel.cubins.iter().all(Image::is_built), "{}", kernel.name);
        }
    }
}

/// A kernel like GEMV_4BIT_BF16 on Hopper, whose cubin is not as the build packed it.
fn damaged(damage: impl FnOnce(Image) -> Image) -> &'static Kernel {
    let kernel = &kernels::GEMV_4BIT_BF16;
    let copy = |form| kernel.image(form, HOPPER).map(|image| Image { ..*image }).unwrap();
    let (ptx, cubin) = (copy(Form::Ptx), damage(copy(Form::Cubin)));
    Box::leak(Box::new(Kernel { ptx: Box::leak(Box::new([ptx])), cubins: Box::leak(Box::new([cubin])), ..*kernel }))
}

#[test]
fn damaged_code_is_an_error_that_names_the_kernel_and_reaches_no_driver() {
    if !kernels::GEMV_4BIT_BF16.image(Form::Cubin, HOPPER).is_some_and(Image::is_built) {
        return;
    }
    let (given, loaded) = driver(damaged(|image| image), HOPPER, None, &[]);
    assert_eq!((given, loaded.unwrap().form), (vec![Form::Cubin], Form::Cubin));

    let checksum = "is damaged in this build, install halfbyte again: its checksum is wrong";
    let short = "is damaged in this build, install halfbyte again: it is shorter than it should be";
    for (kernel, why) in [
        (damaged(|image| Image { crc32: image.crc32 ^ 1, ..image }), checksum),
        (damaged(|image| Image { at: image.at + 16, ..image }), checksum),
        (damaged(|image| Image { at: usize::MAX, ..image }), short),
        (damaged(|image| Image { size: usize::MAX, ..image }), short),
        (damaged(|image| Image { family: usize::MAX, ..image }), "is not in this build"),
    ] {
        let (given, loaded) = driver(kernel, HOPPER, None, &[]);
        assert!(given.is_empty());
        let words = loaded.unwrap_err().to_string();
        assert!(words.contains("kernel gemv_4bit_bf16 on device 0 (a card)"), "{words}");
        assert!(words.contains(&format!("its cubin {why}")), "{words}");
    }
}

#[test]
fn the_launchers_numbers_are_those_of_the_sources() {
    // One of each kind: of a namespace, of an instance of a template, and a product that the compiler made.
    assert_eq!(
        kernels::dequantize_blockwise4::TILE,
        kernels::dequantize_blockwise4::THREADS * kernels::dequantize_blockwise4::GROUP * 4
    );
    assert_eq!(
        kernels::gemm_4bit_small_m_sm80::SHAPE_2_THREADS,
        kernels::GEMM_4BIT_SMALL_M_SM80_BF16_16.threads as usize
    );
    assert_eq!(
        kernels::gemm_4bit_tile_sm90a_bf16_64::SHAPE_64_0_THREADS,
        kernels::GEMM_4BIT_TILE_SM90A_F16_64.threads as usize
    );
    assert!(kernels::GEMM_4BIT_TILE_SM90A_F16_64.dynamic_shared && !kernels::GEMV_4BIT_F16.dynamic_shared);
    // Both element types have the same shape.
    assert_eq!(
        kernels::gemm_4bit_tile_sm90a_bf16_256::SHAPE_256_0_BYTES,
        kernels::gemm_4bit_tile_sm90a_f16_256::SHAPE_256_0_BYTES
    );
}

/// A driver that says this of cubins and PTX; what it was given, and what came of it.
fn driver(
    kernel: &'static Kernel,
    device: Capability,
    only: Option<Form>,
    refuses: &[(Form, bool)],
) -> (Vec<Form>, Result<Loaded<Form>>) {
    let mut given = Vec::new();
    let loaded = load(kernel, device, only, "device 0 (a card)", |code| {
        let form = if code.starts_with(b"\x7fELF") { Form::Cubin } else { Form::Ptx };
        given.push(form);
        let error = || Error::cuda("device 0 (a card)", format!("no {}", form.as_str()));
        match refuses.iter().find(|(refused, _)| *refused == form) {
            None => Ok(form),
            Some((_, true)) => Err(Refusal::Unfit(error())),
            Some((_, false)) => Err(Refusal::Failed(error())),
        }
    });
    (given, loaded)
}

#[test]
fn the_cubin_comes_first_and_the_ptx_when_it_is_refused() {
    if !BUILT {
        return;
    }
    let kernel = &kernels::GEMV_4BIT_BF16;
    let (given, loaded) = driver(kernel, HOPPER, None, &[]);
    let loaded = loaded.unwrap();
    assert_eq!((given, loaded.module, loaded.form), (vec![Form::Cubin], Form::Cubin, Form::Cubin));
    assert!(loaded.refused.is_none());

    let (given, loaded) = driver(kernel, HOPPER, None, &[(Form::Cubin, true)]);
    let loaded = loaded.unwrap();
    assert_eq!((given, loaded.form), (vec![Form::Cubin, Form::Ptx], Form::Ptx));
    assert!(loaded.refused.unwrap().to_string().contains("no cubin"));

    // Another failure is no refusal: a device out of memory would not take the PTX either.
    let (given, loaded) = driver(kernel, HOPPER, None, &[(Form::Cubin, false)]);
    assert_eq!(given, [Form::Cubin]);
    assert!(loaded.unwrap_err().to_string().contains("no cubin"));

    let (given, loaded) = driver(kernel, HOPPER, None, &[(Form::Cubin, true), (Form::Ptx, true)]);
    assert_eq!(given, [Form::Cubin, Form::Ptx]);
    assert!(loaded.unwrap_err().to_string().contains("no ptx"));

    // A card that is newer than the build.
    let (given, loaded) = driver(kernel, Capability(13, 0), None, &[]);
    assert_eq!((given, loaded.unwrap().form), (vec![Form::Ptx], Form::Ptx));
}

#[test]
fn refused_cubins_are_said_once_for_each_device_and_not_tried_again() {
    static HEARD: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let heard = || std::mem::take(&mut *HEARD.lock().unwrap());
    if !BUILT {
        return;
    }
    // Nobody listens yet; and who listens first goes on alone.
    notice::tell("nobody hears this");
    notice::listen(|text| HEARD.lock().unwrap().push(text.to_owned()));
    notice::listen(|text| panic!("the second listener hears {text:?}"));

    // As a device loads one kernel after another.
    let load_next = |forms: &Forms, kernel, refuses: &[(Form, bool)]| {
        let (given, loaded) = driver(kernel, HOPPER, forms.only(), refuses);
        if let Some(error) = loaded.unwrap().refused {
            forms.refused(error);
        }
        given
    };
    let kernels = [&kernels::GEMV_4BIT_BF16, &kernels::GEMV_4BIT_F16, &kernels::DEQUANTIZE_BLOCKWISE4_BF16];
    for device in 0..2 {
        let forms = Forms::new(None);
        assert_eq!(load_next(&forms, kernels[0], &[]), [Form::Cubin]);
        assert!(heard().is_empty(), "device {device}");

        assert_eq!(load_next(&forms, kernels[1], &[(Form::Cubin, true)]), [Form::Cubin, Form::Ptx]);
        let [text] = heard().try_into().unwrap();
        assert!(text.starts_with("the driver refuses the code that was built for this GPU"), "{text}");
        assert!(text.ends_with("device 0 (a card): no cubin"), "{text}");

        assert_eq!(load_next(&forms, kernels[2], &[(Form::Cubin, true)]), [Form::Ptx]);
        // What another thread was told while this one was.
        forms.refused(Error::cuda("device 0 (a card)", "no cubin"));
        assert!(heard().is_empty(), "device {device}");
    }

    // The one form that was asked for is no fallback to be told of.
    assert_eq!(load_next(&Forms::new(Some(Form::Ptx)), kernels[0], &[(Form::Cubin, true)]), [Form::Ptx]);
    assert!(heard().is_empty());
}

#[test]
fn the_environment_asks_for_one_form_alone() {
    if !BUILT {
        return;
    }
    let kernel = &kernels::GEMV_4BIT_BF16;
    let (given, loaded) = driver(kernel, HOPPER, Some(Form::Ptx), &[]);
    assert_eq!((given, loaded.unwrap().form), (vec![Form::Ptx], Form::Ptx));

    let (given, loaded) = driver(kernel, HOPPER, Some(Form::Cubin), &[(Form::Cubin, true)]);
    assert_eq!(given, [Form::Cubin]);
    assert!(loaded.unwrap_err().to_string().contains("no cubin"));

    let (given, loaded) = driver(kernel, Capability(13, 0), Some(Form::Cubin), &[]);
    assert!(given.is_empty());
    let words = loaded.unwrap_err().to_string();
    assert!(
        words.contains("HALFBYTE_KERNELS asks for a cubin, and there is none for compute capability 13.0"),
        "{words}"
    );
}

#[test]
fn what_the_environment_may_ask_for() {
    assert_eq!(parse("").unwrap(), None);
    assert_eq!(parse("ptx").unwrap(), Some(Form::Ptx));
    assert_eq!(parse("cubin").unwrap(), Some(Form::Cubin));
    assert!(parse("PTX").unwrap_err().to_string().contains("HALFBYTE_KERNELS"));
}

#[test]
fn a_kernel_that_there_is_no_code_for_says_why() {
    let (given, loaded) = driver(&kernels::GEMM_4BIT_TILE_SM90A_BF16_64, Capability(10, 0), None, &[]);
    assert!(given.is_empty());
    let words = loaded.unwrap_err().to_string();
    assert!(words.contains("kernel gemm_4bit_tile_sm90a_bf16_64 on device 0 (a card)"), "{words}");
    assert!(words.contains("it is not for devices of compute capability 10.0"), "{words}");

    if !BUILT {
        let (_, loaded) = driver(&kernels::GEMV_4BIT_BF16, HOPPER, None, &[]);
        assert!(loaded.unwrap_err().to_string().contains(NO_KERNELS));
    } else if cfg!(feature = "test-kernels") {
        // It has PTX alone, whatever is asked for.
        let (given, loaded) = driver(&kernels::DEQUANTIZE_BLOCKWISE4_REFERENCE_BF16, HOPPER, Some(Form::Cubin), &[]);
        assert_eq!((given, loaded.unwrap().form), (vec![Form::Ptx], Form::Ptx));
    } else {
        let (given, loaded) = driver(&kernels::DEQUANTIZE_BLOCKWISE4_REFERENCE_BF16, HOPPER, None, &[]);
        assert!(given.is_empty());
        let words = loaded.unwrap_err().to_string();
        assert!(words.contains("cargo feature test-kernels"), "{words}");
    }
}
