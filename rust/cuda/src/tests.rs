//! What can be tested without a GPU: the kernels' tables, and that every kernel that is launched exists.

use halfbyte::codebook::{FP4_THRESHOLDS, NF4_THRESHOLDS, QuantType, dynamic_map};

use super::capability::Capability;
use super::ptx::Module;

const TABLES: &str = include_str!("../../../kernels/tables.cuh");

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

#[test]
fn a_device_gets_the_newest_image_that_it_takes() {
    for module in Module::ALL {
        assert!(module.image(Capability(7, 0)).is_none());
        // Every module has an image for a Hopper, and those that are for it alone have none for later ones.
        let hopper = module.image(Capability(9, 0)).unwrap();
        let newest = module.image(Capability(12, 0)).unwrap_or(hopper);
        assert_eq!(hopper.contains(".target sm_90a\n"), module.image(Capability(12, 0)).is_none(), "{module:?}");
        assert!(newest.starts_with(".version 8.0\n") && newest.ends_with('\0'), "{module:?}");
    }
    assert!(Module::Decode.image(Capability(7, 5)).is_none());
    assert!(Module::DecodeRing.image(Capability(8, 9)).is_none());
    assert!(Module::Dequantize.image(Capability(7, 5)).unwrap().contains(".target sm_75\n"));
    assert!(Module::Dequantize.image(Capability(8, 6)).unwrap().contains(".target sm_80\n"));
}

/// The names in the launchers, as string literals, are entries of the modules.
#[test]
fn every_kernel_that_is_launched_exists() {
    let launchers = [
        (include_str!("blockwise4.rs"), &[Module::Dequantize, Module::Quantize][..]),
        (include_str!("quantize_absmax.rs"), &[Module::Nested]),
        (include_str!("dequantize_absmax.rs"), &[Module::Expand]),
        (include_str!("embedding.rs"), &[Module::Embedding]),
        (include_str!("blockwise8.rs"), &[Module::Dequantize8Bit, Module::Quantize8Bit]),
        (include_str!("int8_rowwise.rs"), &[Module::Rows]),
        (include_str!("decode.rs"), &[Module::Decode, Module::DecodeRing, Module::DecodeRingLong]),
        (include_str!("product.rs"), &[Module::Product]),
        (include_str!("gemv.rs"), &[Module::Gemv]),
        (include_str!("gemm.rs"), &Module::ALL),
    ];
    for (source, modules) in launchers {
        let names: Vec<&str> = source
            .split('"')
            .skip(1)
            .step_by(2)
            .filter(|s| !s.is_empty() && s.contains('_') && s.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
            .filter(|&s| s != "decode_ring")
            .collect();
        assert!(names.len() >= 2);
        for name in names {
            let entry = format!(".entry {name}(");
            let found = modules.iter().any(|m| m.image(Capability(9, 0)).unwrap().contains(&entry));
            assert!(found, "{name}");
        }
    }
}
