//! The JSON of a 4-bit weight: what is written is read back, anything else is refused in words.

use proptest::prelude::*;
use safetensors::Dtype;

use super::super::state::State;
use crate::codebook::QuantType;
use crate::geometry::{BLOCK_SIZES, BlockSize};

fn states() -> impl Strategy<Value = State> {
    (
        prop_oneof![Just(QuantType::Nf4), Just(QuantType::Fp4)],
        prop::sample::select(BLOCK_SIZES.to_vec()),
        prop::sample::select(vec![Dtype::F32, Dtype::F16, Dtype::BF16]),
        prop::collection::vec(0usize..1 << 12, 0..5),
        prop::option::of(any::<u32>().prop_map(f32::from_bits)),
    )
        .prop_map(|(quant_type, blocksize, dtype, shape, nested_offset)| State {
            quant_type,
            blocksize: BlockSize::new(blocksize).unwrap(),
            dtype,
            shape,
            nested_offset,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_is_written_is_read_back(state in states()) {
        let text = state.to_json();
        let mut found = State::parse(text.as_bytes()).unwrap();
        // Every NaN is written as NaN; the bits of any other offset come back.
        if let (Some(was), Some(is)) = (state.nested_offset, found.nested_offset) {
            prop_assert!(was.to_bits() == is.to_bits() || (was.is_nan() && is.is_nan()), "{was} {is}");
            found.nested_offset = state.nested_offset;
        }
        let same = format!("{found:?}") == format!("{state:?}");
        prop_assert!(same, "{found:?} {state:?}");
    }

    #[test]
    fn the_room_kept_for_a_text_suffices(state in states(), bits in any::<u32>()) {
        let planned = State { nested_offset: state.nested_offset.map(|_| 0.0), ..state.clone() };
        let written = State { nested_offset: state.nested_offset.map(|_| f32::from_bits(bits)), ..state };
        prop_assert!(written.to_json().len() <= planned.max_json_len());
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Err(problem) = State::parse(&bytes) {
            prop_assert!(!problem.contains('\n'));
        }
    }

    #[test]
    fn a_changed_text_is_read_or_refused(state in states(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = state.to_json().into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(found) = State::parse(&bytes) {
            prop_assert!(found.elements().checked_mul(64).is_some());
        }
    }
}

#[test]
fn the_extremes_of_an_offset_fit() {
    let state = |offset| State {
        quant_type: QuantType::Nf4,
        blocksize: BlockSize::DEFAULT,
        dtype: Dtype::F32,
        shape: vec![1],
        nested_offset: Some(offset),
    };
    for offset in [f32::MIN, f32::MAX, -f32::MIN_POSITIVE, f32::from_bits(1), -1.1e-38, f32::NEG_INFINITY, f32::NAN] {
        assert!(state(offset).to_json().len() <= state(0.0).max_json_len());
        let found = State::parse(state(offset).to_json().as_bytes()).unwrap().nested_offset.unwrap();
        assert!(found == offset || offset.is_nan() && found.is_nan());
    }
}

#[test]
fn hostile_states_are_refused() {
    let base = r#""quant_type":"nf4","blocksize":64,"dtype":"float32""#;
    for (shape, word) in [
        ("[18446744073709551615]", "overflows"),
        ("[288230376151711744]", "overflows"),
        ("[18446744073709551616]", "valid"),
        ("[1.5]", "valid"),
        ("[null]", "valid"),
        ("{}", "valid"),
    ] {
        let text = format!(r#"{{{base},"shape":{shape}}}"#);
        let problem = State::parse(text.as_bytes()).unwrap_err();
        assert!(problem.contains(word), "{text}: {problem}");
    }
    let many = format!(r#"{{{base},"shape":[{}]}}"#, vec!["1"; 65].join(","));
    assert!(State::parse(many.as_bytes()).unwrap_err().contains("shape"));
    let deep = format!(r#"{{{base},"shape":[1],"x":{}{}}}"#, "[".repeat(20_000), "]".repeat(20_000));
    assert_eq!(State::parse(deep.as_bytes()).unwrap().shape, [1], "what is not read may be deep");
    assert!(State::parse(&[b' '; 1 << 17]).unwrap_err().contains("65536"));
    let word = format!(r#"{{{base},"shape":[1],"nested_blocksize":256,"nested_offset":"soon"}}"#);
    assert!(State::parse(word.as_bytes()).unwrap_err().contains("nested_offset"));
}
