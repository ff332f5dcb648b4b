//! 8-bit weights: made, read back, compared, and refused where their parts do not fit.

use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::Dtype;

use super::super::options::Selected;
use super::super::options::Selector;
use super::super::plan::Action;
use super::super::verify::{Status, VerifyReport, verify};
use super::super::weight_type::WeightType;
use super::*;

const NAME: &str = "model.layers.0.mlp.up_proj.weight";
const SCALES: &str = "model.layers.0.mlp.up_proj.SCB";
const FORMAT: &str = "model.layers.0.mlp.up_proj.weight_format";

fn open(folder: &Path) -> Checkpoint {
    Checkpoint::open(folder).unwrap()
}

fn int8() -> QuantizeOptions {
    QuantizeOptions { quant_type: WeightType::Int8, ..quantize_options(1 << 30) }
}

fn rule(text: &str) -> QuantizeOptions {
    QuantizeOptions { rules: vec![text.parse().unwrap()], ..quantize_options(1 << 30) }
}

fn planned(folder: &Path, options: &QuantizeOptions) -> Result<Plan> {
    Plan::quantize(Checkpoint::open(folder)?, None, options, None)
}

fn convert(plan: &Plan, to: &Path, threads: usize) -> Result<RunReport> {
    let options = RunOptions { mode: Mode::New, config_text: None, threads, durable: false };
    execute::run(plan, to, &options, &Progress::default())
}

fn compare(a: &Path, b: &Path, config_b: Option<&Value>) -> VerifyReport {
    verify(&open(a), &open(b), None, config_b, 2, &Progress::default()).unwrap()
}

fn bytes_of(folder: &Path, name: &str) -> (Dtype, Vec<usize>, Vec<u8>) {
    let found = open(folder);
    let at = found.find(name).unwrap_or_else(|| panic!("{name} is not there"));
    let entry = found.tensor(at);
    (entry.dtype, entry.shape.clone(), found.read(at).unwrap())
}

fn encoded(dtype: &str, values: &[f32]) -> Vec<u8> {
    match dtype {
        "BF16" => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        "F16" => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

fn decoded(dtype: &str, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        "BF16" => bytes.chunks(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        "F16" => bytes.chunks(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
    }
}

/// A folder of folders, of which one is a checkpoint.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new(tensors: &[Named<'_>]) -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(place.path()).unwrap();
        write_tensors(&place.path().join("model.safetensors"), tensors);
        place
    }

    /// The checkpoint.
    fn path(&self) -> PathBuf {
        self.beside("source")
    }

    /// Another folder.
    fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// A checkpoint of one weight.
fn one_weight(dtype: &str, shape: [usize; 2], values: &[f32]) -> Place {
    Place::new(&[(NAME, dtype, shape.to_vec(), encoded(dtype, values))])
}

/// Codes and scales of rows of float16 values, as the format defines them.
fn definition(values: &[f32], columns: usize) -> (Vec<u8>, Vec<u8>) {
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for row in values.chunks(columns) {
        let scale = row.iter().fold(0.0f32, |scale, x| scale.max(x.abs()));
        codes.extend(row.iter().map(|x| (x * 127.0 / scale).round_ties_even() as i8 as u8));
        scales.extend(scale.to_le_bytes());
    }
    (codes, scales)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn rows_are_written_as_defined_and_read_back(
        dtype in prop::sample::select(vec!["BF16", "F16", "F32"]),
        columns in 1usize..300,
        values in prop::collection::vec(prop_oneof![-2.0f32..2.0, -6e4f32..6e4, -1e-6f32..1e-6], 1..900),
        threads in 1usize..4,
    ) {
        let rows = values.len() / columns;
        prop_assume!(rows > 0);
        let values = &values[..rows * columns];
        let source = one_weight(dtype, [rows, columns], values);
        let (out, back) = (source.beside("out"), source.beside("back"));
        convert(&planned(&source.path(), &int8()).unwrap(), &out, threads).unwrap();

        let stored = decoded(dtype, &encoded(dtype, values));
        let halves: Vec<f32> = stored.iter().map(|&v| f16::from_f32(v).to_f32()).collect();
        let (codes, scales) = definition(&halves, columns);
        prop_assert_eq!(bytes_of(&out, NAME), (Dtype::I8, vec![rows, columns], codes.clone()));
        prop_assert_eq!(bytes_of(&out, SCALES), (Dtype::F32, vec![rows], scales.clone()));
        prop_assert_eq!(bytes_of(&out, FORMAT), (Dtype::U8, vec![], vec![0]));
        let found = compare(&source.path(), &out, None);
        prop_assert_eq!(found.tensors.len(), 1);
        prop_assert_eq!((found.tensors[0].status, found.tensors[0].kind.as_str()), (Status::Identical, "int8"));
        prop_assert_eq!(compare(&out, &out, None).tensors[0].status, Status::Identical);

        let to = DequantizeOptions { dtype: Some(Dtype::F32), ..dequantize_options(1 << 30) };
        convert(&Plan::dequantize(open(&out), None, &to).unwrap(), &back, threads).unwrap();
        let scales = decoded("F32", &scales);
        let expected = codes.iter().enumerate().map(|(i, &c)| f32::from(c as i8) * scales[i / columns] * (1.0 / 127.0));
        let (dtype, shape, bytes) = bytes_of(&back, NAME);
        prop_assert_eq!((dtype, shape), (Dtype::F32, vec![rows, columns]));
        prop_assert_eq!(decoded("F32", &bytes), expected.collect::<Vec<_>>());
    }
}

#[test]
fn rows_of_any_length_are_cut_into_pieces_that_do_not_show() {
    for shape in [[3, 400_000], [9000, 64], [1, 1], [70_001, 3]] {
        let count = shape[0] * shape[1];
        let values = weights(count, 7);
        let folder = Place::new(&[(NAME, "BF16", shape.to_vec(), values.clone())]);
        let (one, many) = (folder.beside("one"), folder.beside("many"));
        let plan = planned(&folder.path(), &int8()).unwrap();
        convert(&plan, &one, 1).unwrap();
        convert(&plan, &many, 4).unwrap();
        assert_eq!(files(&one), files(&many));
        let (codes, scales) = definition(&decoded("BF16", &values), shape[1]);
        assert!(bytes_of(&one, NAME).2 == codes && bytes_of(&one, SCALES).2 == scales, "{shape:?}");
        assert_eq!(compare(&folder.path(), &one, None).tensors[0].status, Status::Identical);
        let back = folder.beside("back");
        convert(&Plan::dequantize(open(&one), None, &dequantize_options(1 << 30)).unwrap(), &back, 4).unwrap();
        let values = decoded("BF16", &values);
        let near = decoded("F16", &bytes_of(&back, NAME).2).iter().zip(&values).all(|(x, y)| (x - y).abs() < 0.005);
        assert!(near, "{shape:?}");
    }
}

#[test]
fn a_weight_is_cast_to_the_dtype_of_the_model_before_it_becomes_float16() {
    // In bfloat16 these two are one number.
    let source = one_weight("F32", [1, 2], &[1.0, 1.0 + 1.0 / 256.0]);
    let out = source.beside("out");
    let options = QuantizeOptions { dtype: Some(Dtype::BF16), ..int8() };
    convert(&planned(&source.path(), &options).unwrap(), &out, 1).unwrap();
    assert_eq!(bytes_of(&out, NAME).2, [127, 127]);
    let status = |config: Option<&Value>| compare(&source.path(), &out, config).tensors[0].status;
    assert_eq!(status(Some(&json!({"dtype": "bfloat16"}))), Status::Identical);
    assert_eq!(status(None), Status::Differs);
}

#[test]
fn a_code_of_a_value_in_the_middle_may_be_either_of_two() {
    // 63.5 and 31.75 of 127.
    let source = one_weight("F32", [1, 4], &[1.0, 0.5, 0.25, -1.0]);
    let out = source.beside("out");
    convert(&planned(&source.path(), &int8()).unwrap(), &out, 1).unwrap();
    let file = out.join("model.safetensors");
    let good = fs::read(&file).unwrap();
    let at = good.windows(4).rposition(|codes| codes == [127, 64, 32, 129]).unwrap();
    for (code, value, status) in [(1, 63, Status::Rounded), (1, 62, Status::Differs), (2, 31, Status::Differs)] {
        let mut bad = good.clone();
        bad[at + code] = value;
        fs::write(&file, bad).unwrap();
        let found = compare(&source.path(), &out, None);
        assert_eq!((found.tensors[0].status, found.tensors[0].differing_bytes), (status, Some(1)));
    }
    let mut bad = good.clone();
    let scale = bad.windows(4).rposition(|bytes| bytes == 1.0f32.to_le_bytes()).unwrap();
    bad[scale] ^= 1;
    fs::write(&file, bad).unwrap();
    let found = compare(&source.path(), &out, None);
    assert_eq!((found.tensors[0].status, found.tensors[0].differing_bytes), (Status::Differs, Some(0)));
    assert!(found.tensors[0].detail.contains("scales"));
}

#[test]
fn values_that_float16_cannot_hold_are_refused_by_name_and_leave_nothing() {
    for (dtype, bad, words) in [
        ("BF16", 1e5f32, "too large for float16"),
        ("F32", -65520.0, "too large for float16"),
        ("F32", f32::NAN, "NaN"),
        ("F16", f32::NEG_INFINITY, "-inf"),
    ] {
        let mut values = vec![0.5; 6 * 64];
        values[3 * 64 + 5] = bad;
        let source = one_weight(dtype, [6, 64], &values);
        let out = source.beside("out");
        let text = message(convert(&planned(&source.path(), &int8()).unwrap(), &out, 2), "model.safetensors");
        assert!(text.contains(NAME) && text.contains("element 197") && text.contains(words), "{text}");
        assert!(!out.exists());
        let options = QuantizeOptions { allow_nonfinite: true, ..int8() };
        convert(&planned(&source.path(), &options).unwrap(), &out, 2).unwrap();
        let scales = decoded("F32", &bytes_of(&out, SCALES).2);
        assert_eq!(scales[3], if bad.is_nan() { 0.5 } else { f32::INFINITY });
        assert!(scales.iter().enumerate().all(|(row, &scale)| row == 3 || scale == 0.5));
    }
}

#[test]
fn a_plan_says_what_becomes_of_each_kind() {
    let folder = Place { folder: tempfile::tempdir().unwrap() };
    write_checkpoint(&folder.path(), 3);
    let mixed = |note: &&String| note.contains("mixed");
    let plan = planned(&folder.path(), &rule(r"layers\.1\.mlp=int8")).unwrap();
    let (eight, four) = (plan.tensors.iter().filter(|t| t.to == "int8"), plan.tensors.iter().filter(|t| t.to == "nf4"));
    assert_eq!((eight.count(), four.count()), (1, 2));
    assert_eq!(plan.notes.iter().filter(mixed).count(), 1);
    let report = plan.report();
    let found: Vec<_> = report
        .types
        .iter()
        .map(|line| (line.name, line.tensors, line.weights, line.bytes_in, line.bytes_out))
        .collect();
    // Codes, a float32 scale for each of 16 rows, and one byte.
    let int8 = ("int8", 1, 1024, 2048, 1024 + 64 + 1);
    assert_eq!((found.len(), found[2], found[1]), (3, int8, ("keep", 3, 192, 384, 384)));
    for options in [self::int8(), quantize_options(1 << 30), rule(".=int8")] {
        let plan = planned(&folder.path(), &options).unwrap();
        assert_eq!(plan.notes.iter().filter(mixed).count(), 0, "{:?}", plan.notes);
    }
    let quantized = |plan: &Plan| {
        plan.shards.iter().flat_map(|s| &s.actions).filter(|a| matches!(a, Action::QuantizeRows { .. })).count()
    };
    assert_eq!(quantized(&plan), 1);

    // Mixed weights are compared, described and read back each as what it is.
    let (out, back) = (folder.beside("out"), folder.beside("back"));
    convert(&plan, &out, 2).unwrap();
    assert!(compare(&folder.path(), &out, None).tensors.iter().all(|t| t.status == Status::Identical));
    let found = open(&out);
    let described = super::super::inspect::inspect(&found, None).unwrap();
    let kinds: Vec<_> = described.weights.iter().map(|w| (w.quant_type, w.blocksize)).collect();
    assert_eq!(kinds, [("nf4", Some(64)), ("nf4", Some(64)), ("int8", None)]);
    convert(&Plan::dequantize(open(&out), None, &dequantize_options(1 << 30)).unwrap(), &back, 2).unwrap();
    let dtypes: Vec<_> = (0..3)
        .map(|layer| bytes_of(&back, &format!("model.layers.{layer}.mlp.up_proj.weight")))
        .map(|(dtype, shape, _)| (dtype, shape))
        .collect();
    // An 8-bit weight does not say what it was: it is float16 where config.json does not either.
    assert_eq!(dtypes.iter().map(|d| d.0).collect::<Vec<_>>(), [Dtype::BF16, Dtype::F16, Dtype::BF16]);
    assert!(dtypes.iter().all(|d| d.1 == [16, 64]));
    let config = json!({"torch_dtype": "bfloat16"});
    let plan = Plan::dequantize(open(&out), Some(&config), &dequantize_options(1 << 30)).unwrap();
    assert!(plan.tensors.iter().all(|t| t.to == "BF16" || t.to == "keep"));
    assert_eq!(compare(&out, &back, None).tensors.iter().filter(|t| t.status == Status::Shape).count(), 3);
}

#[test]
fn only_what_is_called_weight_has_an_8_bit_form() {
    let name = "blocks.0.in_proj";
    let folder = Place::new(&[(name, "BF16", vec![4, 64], weights(256, 1))]);
    let selected = Selected { tensors: [name.to_owned()].into(), conv1d: None };
    let options = QuantizeOptions { selection: Selector::Transformers, ..int8() };
    let text = message(Plan::quantize(open(&folder.path()), None, &options, Some(&selected)), "model.safetensors");
    assert!(text.contains(name) && text.contains("\"weight\""), "{text}");
}

#[test]
fn parts_that_do_not_fit_are_refused_by_name() {
    let codes = || (NAME, "I8", vec![4, 8], vec![3; 32]);
    let scales = || (SCALES, "F32", vec![4], encoded("F32", &[1.0; 4]));
    let cases: Vec<(Vec<Named<'_>>, &str, &str)> = vec![
        (vec![codes()], NAME, "SCB"),
        (vec![codes(), (FORMAT, "U8", vec![], vec![0])], FORMAT, "SCB"),
        (vec![scales(), (FORMAT, "U8", vec![], vec![0])], SCALES, NAME),
        (vec![codes(), (SCALES, "F32", vec![3], vec![0; 12])], SCALES, "[4]"),
        (vec![codes(), (SCALES, "F16", vec![4], vec![0; 8])], SCALES, "F32"),
        (vec![codes(), (SCALES, "F32", vec![], vec![0; 4])], SCALES, "[4]"),
        (vec![scales(), (NAME, "BF16", vec![4, 8], vec![0; 64]), (FORMAT, "U8", vec![], vec![0])], NAME, "I8"),
        (vec![scales(), (NAME, "I8", vec![32], vec![0; 32])], NAME, "two dimensions"),
        (vec![codes(), scales(), (FORMAT, "U8", vec![], vec![1])], FORMAT, "is 1"),
        (vec![codes(), scales(), (FORMAT, "U8", vec![2], vec![0; 2])], FORMAT, "one U8"),
        (vec![codes(), scales(), (FORMAT, "I64", vec![], vec![0; 8])], FORMAT, "one U8"),
        (vec![codes(), scales(), ("b.weight", "I8", vec![4, 8], vec![0; 32])], "b.weight", "b.SCB"),
    ];
    for (tensors, name, word) in cases {
        let folder = Place::new(&tensors);
        let text =
            message(Plan::dequantize(open(&folder.path()), None, &dequantize_options(1 << 30)), "model.safetensors");
        assert!(text.contains(name) && text.contains(word), "{text}");
        assert!(planned(&folder.path(), &int8()).is_err(), "{name}: a source that is quantized already");
    }
    // Without the number that names the order, as old releases wrote it, and with tensors of other methods beside.
    let folder = Place::new(&[codes(), scales(), ("table", "I8", vec![2, 2], vec![1; 4])]);
    let plan = Plan::dequantize(open(&folder.path()), None, &dequantize_options(1 << 30)).unwrap();
    assert_eq!(plan.tensors.iter().map(|t| t.to.as_str()).collect::<Vec<_>>(), ["F16", "keep"]);
}

#[test]
fn a_scale_beyond_the_dtype_is_refused_by_name() {
    let tensors =
        [(NAME, "I8", vec![2, 2], vec![127, 1, 1, 129]), (SCALES, "F32", vec![2], encoded("F32", &[1.0, 7e4]))];
    let folder = Place::new(&tensors);
    let to = |dtype| DequantizeOptions { dtype: Some(dtype), ..dequantize_options(1 << 30) };
    let planned = |dtype| Plan::dequantize(open(&folder.path()), None, &to(dtype)).unwrap();
    let out = folder.beside("out");
    let error = convert(&planned(Dtype::F16), &out, 1).unwrap_err();
    assert!(matches!(error, Error::TooLarge { index: 3, dtype: "float16", .. }), "{error}");
    assert!(!out.exists());
    convert(&planned(Dtype::BF16), &out, 1).unwrap();
}

#[test]
fn codes_of_no_elements_are_read() {
    for shape in [vec![0, 8], vec![3, 0]] {
        let tensors = [
            (NAME, "I8", shape.clone(), vec![]),
            (SCALES, "F32", vec![shape[0]], vec![0; 4 * shape[0]]),
            ("norm.weight", "F32", vec![1], vec![0; 4]),
        ];
        let folder = Place::new(&tensors);
        let out = folder.beside("out");
        convert(&Plan::dequantize(open(&folder.path()), None, &dequantize_options(1 << 30)).unwrap(), &out, 2).unwrap();
        assert_eq!(bytes_of(&out, NAME), (Dtype::F16, shape, vec![]));
        assert!(compare(&folder.path(), &folder.path(), None).tensors.iter().all(|t| t.status == Status::Identical));
    }
}
