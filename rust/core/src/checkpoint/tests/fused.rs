//! Tensors that hold many experts: what becomes of each matrix is what would become of it alone.

use safetensors::Dtype;
use tempfile::tempdir;

use super::*;
use crate::checkpoint::fused::FUSED_KEY;
use crate::checkpoint::matrix::decode_mxfp4;
use crate::checkpoint::verify;
use crate::checkpoint::weight_type::WeightType;

/// Experts, width and inner width. No matrix of the second is a whole number of blocks; the third is cut into strips.
const SIZES: [[usize; 3]; 3] = [[3, 64, 32], [2, 35, 10], [2, 96, 80]];
const EXPERTS: &str = "model.layers.0.mlp.experts";

/// How a source holds its experts.
#[derive(Clone, Copy)]
struct How {
    model_type: &'static str,
    transposed: bool,
    interleaved: bool,
    names: [&'static str; 2],
    module: &'static str,
}

const HOW: [How; 4] = [
    How {
        model_type: "qwen3_5_moe",
        transposed: false,
        interleaved: false,
        names: ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        module: "mlp.experts",
    },
    How {
        model_type: "qwen3_vl_moe",
        transposed: true,
        interleaved: false,
        names: ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        module: "mlp.experts",
    },
    How {
        model_type: "gpt_oss",
        transposed: true,
        interleaved: true,
        names: ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        module: "mlp.experts",
    },
    How {
        model_type: "granitemoe",
        transposed: false,
        interleaved: false,
        names: ["moe.input_linear.weight", "moe.output_linear.weight"],
        module: "moe.experts",
    },
];

type Matrix = Vec<[u8; 2]>;

fn matrix(len: usize, seed: u64) -> Matrix {
    weights(len, seed).chunks(2).map(|b| [b[0], b[1]]).collect()
}

/// Of each expert gate, up and down projection.
fn matrices([experts, width, inner]: [usize; 3]) -> Vec<[Matrix; 3]> {
    let one = |seed| matrix(width * inner, seed);
    (0..experts as u64).map(|e| [one(3 * e + 1), one(3 * e + 2), one(3 * e + 3)]).collect()
}

/// One tensor of all experts; each projection is `[rows, columns]`.
fn fuse(experts: &[Vec<&Matrix>], rows: usize, columns: usize, transposed: bool, interleaved: bool) -> Vec<u8> {
    let mut out = Vec::new();
    for projections in experts {
        let count = projections.len();
        let value = |row: usize, column: usize| {
            let (projection, row) = if interleaved { (row % count, row / count) } else { (row / rows, row % rows) };
            projections[projection][row * columns + column]
        };
        if transposed {
            (0..columns).for_each(|c| (0..rows * count).for_each(|r| out.extend(value(r, c))));
        } else {
            (0..rows * count).for_each(|r| (0..columns).for_each(|c| out.extend(value(r, c))));
        }
    }
    out
}

fn write(folder: &Path, model_type: &str, experts: usize, tensors: &[Named<'_>]) -> Value {
    fs::create_dir_all(folder).unwrap();
    write_tensors(&folder.join("model.safetensors"), tensors);
    let config = json!({"model_type": model_type, "num_experts": experts, "dtype": "bfloat16"});
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    config
}

/// The same experts in fused tensors and one by one; gives the config.
fn both(folder: &Path, how: How, [experts, width, inner]: [usize; 3]) -> Value {
    let all = matrices([experts, width, inner]);
    let wide: Vec<Vec<&Matrix>> = all.iter().map(|[gate, up, _]| vec![gate, up]).collect();
    let down: Vec<Vec<&Matrix>> = all.iter().map(|[.., down]| vec![down]).collect();
    let shape = |rows: usize, columns: usize| {
        if how.transposed { vec![experts, columns, rows] } else { vec![experts, rows, columns] }
    };
    let names = how.names.map(|name| format!("model.layers.0.{name}"));
    let bias = format!("{EXPERTS}.gate_up_proj_bias");
    let router = "model.layers.0.moe.router.layer.weight";
    let rest = [
        (bias.as_str(), "BF16", vec![experts, 2 * inner], weights(experts * 2 * inner, 99)),
        (router, "BF16", vec![experts, width], weights(experts * width, 98)),
    ];
    let fused = [
        (
            names[0].as_str(),
            "BF16",
            shape(2 * inner, width),
            fuse(&wide, inner, width, how.transposed, how.interleaved),
        ),
        (names[1].as_str(), "BF16", shape(width, inner), fuse(&down, width, inner, how.transposed, false)),
    ];
    let config = write(&folder.join("fused"), how.model_type, experts, &[&fused[..], &rest[..]].concat());
    let named: Vec<(String, Vec<usize>, Vec<u8>)> = all
        .iter()
        .enumerate()
        .flat_map(|(e, matrices)| {
            let shapes = [[inner, width], [inner, width], [width, inner]];
            ["gate_proj", "up_proj", "down_proj"].into_iter().zip(shapes).zip(matrices).map(
                move |((name, shape), matrix)| {
                    let name = format!("model.layers.0.{}.{e}.{name}.weight", how.module);
                    (name, shape.to_vec(), matrix.concat())
                },
            )
        })
        .collect();
    let apart: Vec<Named<'_>> =
        named.iter().map(|(name, shape, bytes)| (name.as_str(), "BF16", shape.clone(), bytes.clone())).collect();
    write(&folder.join("apart"), how.model_type, experts, &[&apart[..], &rest[..]].concat());
    config
}

fn options(threads: usize) -> RunOptions {
    RunOptions { mode: Mode::New, config_text: Some("{}".to_owned()), threads, durable: false }
}

fn run(source: &Path, out: &Path, config: &Value, options_: &QuantizeOptions) -> Result<()> {
    let plan = Plan::quantize(Checkpoint::open(source)?, Some(config), options_, None)?;
    execute::run(&plan, out, &options(2), &Progress::default())?;
    Ok(())
}

fn undo(source: &Path, out: &Path, config: &Value) {
    let plan = Plan::dequantize(Checkpoint::open(source).unwrap(), Some(config), &dequantize_options(1 << 40)).unwrap();
    let progress = Progress::default();
    execute::run(&plan, out, &options(2), &progress).unwrap();
    let (done, total, _) = progress.read();
    assert_eq!(done, total);
}

/// Every tensor by its name: dtype, shape and bytes.
fn tensors(folder: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let each = checkpoint.order.iter().map(|&at| {
        let entry = checkpoint.tensor(at);
        (entry.name.clone(), (entry.dtype, entry.shape.clone(), checkpoint.read(at).unwrap()))
    });
    each.collect()
}

#[test]
fn fused_experts_become_what_each_matrix_alone_becomes() {
    for how in HOW {
        for sizes in SIZES {
            for to in [WeightType::default(), WeightType::Int8] {
                let home = tempdir().unwrap();
                let folder = home.path();
                let config = both(folder, how, sizes);
                let options = QuantizeOptions { quant_type: to, ..quantize_options(1 << 40) };
                for source in ["fused", "apart"] {
                    run(&folder.join(source), &folder.join(format!("{source}-q")), &config, &options).unwrap();
                }
                let (found, expected) = (tensors(&folder.join("fused-q")), tensors(&folder.join("apart-q")));
                assert!(found == expected, "{} {sizes:?} {to}: {:?}", how.model_type, found.keys());

                // Verified against either form, each matrix is what it should be.
                for source in ["fused", "apart"] {
                    let (a, b) = (Checkpoint::open(&folder.join(source)), Checkpoint::open(&folder.join("fused-q")));
                    let (a, b) = (a.unwrap(), b.unwrap());
                    let report = verify::verify(&a, &b, Some(&config), Some(&config), 2, &Progress::default()).unwrap();
                    assert_eq!(report.tensors.len(), 3 * sizes[0] + 2);
                    let odd = report.tensors.iter().find(|row| row.status != verify::Status::Identical);
                    assert!(odd.is_none(), "{} {sizes:?} {to} {source}: {odd:?}", how.model_type);
                }

                // Back under the names that the source had, in its order.
                for source in ["fused", "apart"] {
                    undo(&folder.join(format!("{source}-q")), &folder.join(format!("{source}-d")), &config);
                }
                let (back, apart) = (tensors(&folder.join("fused-d")), tensors(&folder.join("apart-d")));
                let original = tensors(&folder.join("fused"));
                assert!(back.keys().eq(original.keys()), "{:?}", back.keys());
                let values = |e: usize, name: &str| -> Matrix {
                    let (.., bytes) = &apart[&format!("model.layers.0.{}.{e}.{name}.weight", how.module)];
                    bytes.chunks(2).map(|b| [b[0], b[1]]).collect()
                };
                let [experts, width, inner] = sizes;
                let all: Vec<[Matrix; 3]> =
                    (0..experts).map(|e| ["gate_proj", "up_proj", "down_proj"].map(|name| values(e, name))).collect();
                let wide: Vec<Vec<&Matrix>> = all.iter().map(|[gate, up, _]| vec![gate, up]).collect();
                let down: Vec<Vec<&Matrix>> = all.iter().map(|[.., down]| vec![down]).collect();
                let names = how.names.map(|name| format!("model.layers.0.{name}"));
                assert_eq!(back[&names[0]].1, original[&names[0]].1);
                assert!(back[&names[0]].2 == fuse(&wide, inner, width, how.transposed, how.interleaved));
                assert!(back[&names[1]].2 == fuse(&down, width, inner, how.transposed, false));
            }
        }
    }
}

#[test]
fn mxfp4_experts_are_decoded_and_become_what_their_values_become() {
    let home = tempdir().unwrap();
    let folder = home.path();
    let [experts, width, inner] = [2usize, 96, 64];
    let codes = |len: usize, seed| weights(len.div_ceil(2), seed)[..len].to_vec();
    let scales =
        |len: usize, seed| weights(len.div_ceil(2), seed)[..len].iter().map(|b| 120 + b % 9).collect::<Vec<u8>>();
    let (wide_codes, wide_scales) =
        (codes(experts * 2 * inner * width / 2, 1), scales(experts * 2 * inner * width / 32, 2));
    let (down_codes, down_scales) = (codes(experts * width * inner / 2, 3), scales(experts * width * inner / 32, 4));
    let names: Vec<String> = ["gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales"]
        .iter()
        .map(|name| format!("{EXPERTS}.{name}"))
        .collect();
    let packed = [
        (names[0].as_str(), "U8", vec![experts, 2 * inner, width / 32, 16], wide_codes.clone()),
        (names[1].as_str(), "U8", vec![experts, 2 * inner, width / 32], wide_scales.clone()),
        (names[2].as_str(), "U8", vec![experts, width, inner / 32, 16], down_codes.clone()),
        (names[3].as_str(), "U8", vec![experts, width, inner / 32], down_scales.clone()),
    ];
    let mut config = write(&folder.join("mx"), "gpt_oss", experts, &packed);
    config["quantization_config"] = json!({"quant_method": "mxfp4"});
    // The same values in bfloat16, in the order that transformers has them in: [experts, in, out].
    let dense = |codes: &[u8], scales: &[u8], rows: usize, columns: usize| {
        let mut values = vec![0; codes.len() * 4];
        decode_mxfp4(codes, scales, &mut values);
        let mut turned = Vec::new();
        for expert in values.chunks(rows * columns * 2) {
            (0..columns).for_each(|c| (0..rows).for_each(|r| turned.extend(&expert[(r * columns + c) * 2..][..2])));
        }
        turned
    };
    let (wide, down) = (format!("{EXPERTS}.gate_up_proj"), format!("{EXPERTS}.down_proj"));
    let plain = [
        (wide.as_str(), "BF16", vec![experts, width, 2 * inner], dense(&wide_codes, &wide_scales, 2 * inner, width)),
        (down.as_str(), "BF16", vec![experts, inner, width], dense(&down_codes, &down_scales, width, inner)),
    ];
    let plain_config = write(&folder.join("plain"), "gpt_oss", experts, &plain);
    let options = quantize_options(1 << 40);
    run(&folder.join("mx"), &folder.join("mx-q"), &config, &options).unwrap();
    run(&folder.join("plain"), &folder.join("plain-q"), &plain_config, &options).unwrap();
    assert!(tensors(&folder.join("mx-q")) == tensors(&folder.join("plain-q")));
    let open = |name: &str| Checkpoint::open(&folder.join(name)).unwrap();
    let report =
        verify::verify(&open("mx"), &open("mx-q"), Some(&config), Some(&config), 2, &Progress::default()).unwrap();
    assert_eq!(report.tensors.len(), 3 * experts);
    assert!(report.tensors.iter().all(|row| row.status == verify::Status::Identical));
    undo(&folder.join("mx-q"), &folder.join("mx-d"), &config);
    undo(&folder.join("plain-q"), &folder.join("plain-d"), &config);
    assert!(tensors(&folder.join("mx-d")) == tensors(&folder.join("plain-d")));

    // Nothing is left to say what they were, where all are kept.
    let keep = QuantizeOptions { rules: vec!["experts=keep".parse().unwrap()], ..quantize_options(1 << 40) };
    message(Plan::quantize(open("mx"), Some(&config), &keep, None).map(|_| ()), "gate_up_proj_blocks");
    // Another method, or another model, is as before.
    let other = json!({"model_type": "gpt_oss", "quantization_config": {"quant_method": "fp8"}});
    message(Plan::quantize(open("mx"), Some(&other), &options, None).map(|_| ()), "config.json");
    message(Plan::quantize(open("mx"), Some(&json!({"model_type": "llama"})), &options, None).map(|_| ()), "_blocks");
    // A scale that stands for NaN.
    let mut broken = packed.to_vec();
    broken[1].3[5] = 255;
    write(&folder.join("nan"), "gpt_oss", experts, &broken);
    let text = message(run(&folder.join("nan"), &folder.join("nan-q"), &config, &options), "experts.0.");
    assert!(text.contains("NaN"), "{text}");
    assert!(!folder.join("nan-q").exists());
}

#[test]
fn a_rule_takes_experts_apart_only_where_it_quantizes_some() {
    let home = tempdir().unwrap();
    let folder = home.path();
    let config = both(folder, HOW[2], SIZES[0]);
    let with = |rules: &[&str]| {
        let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        let options = QuantizeOptions { rules, ..quantize_options(1 << 40) };
        Plan::quantize(Checkpoint::open(&folder.join("fused")).unwrap(), Some(&config), &options, None).unwrap()
    };
    let plan = with(&[r"experts\.1\.=keep", r"experts\.2\.up_proj=fp4"]);
    let to: BTreeMap<&str, &str> = plan.tensors.iter().map(|t| (t.name.as_str(), t.to.as_str())).collect();
    let at = |name: &str| to[format!("{EXPERTS}.{name}.weight").as_str()];
    assert_eq!(
        (at("0.gate_proj"), at("1.down_proj"), at("2.up_proj"), at("2.down_proj")),
        ("nf4", "keep", "fp4", "nf4")
    );
    assert!(plan.skip_modules.as_ref().unwrap().iter().any(|name| name.contains("experts.1")));
    // The kept matrix is the one of the source.
    execute::run(&plan, &folder.join("some"), &options(1), &Progress::default()).unwrap();
    let (found, apart) = (tensors(&folder.join("some")), tensors(&folder.join("apart")));
    for name in ["gate_proj", "up_proj", "down_proj"] {
        let name = format!("{EXPERTS}.1.{name}.weight");
        assert!(found[&name] == apart[&name], "{name}");
    }

    let lone = ("model.layers.0.self_attn.q_proj.weight", "BF16", vec![64, 64], weights(64 * 64, 7));
    let source = Checkpoint::open(&folder.join("fused")).unwrap();
    let all: Vec<(String, Vec<usize>, Vec<u8>)> = source
        .order
        .iter()
        .map(|&at| (source.tensor(at).name.clone(), source.tensor(at).shape.clone(), source.read(at).unwrap()))
        .collect();
    let mut more: Vec<Named<'_>> = all.iter().map(|(n, s, b)| (n.as_str(), "BF16", s.clone(), b.clone())).collect();
    more.push(lone);
    let config = write(&folder.join("more"), "gpt_oss", 3, &more);
    let options = QuantizeOptions { rules: vec!["experts=keep".parse().unwrap()], ..quantize_options(1 << 40) };
    run(&folder.join("more"), &folder.join("more-q"), &config, &options).unwrap();
    let (found, original) = (tensors(&folder.join("more-q")), tensors(&folder.join("more")));
    for name in ["gate_up_proj", "down_proj"] {
        let name = format!("{EXPERTS}.{name}");
        assert!(found[&name] == original[&name], "{name}");
    }
    assert!(!Checkpoint::open(&folder.join("more-q")).unwrap().metadata().contains_key(FUSED_KEY));
}

#[test]
fn experts_that_do_not_fit_are_named_before_anything_is_written() {
    let wide = format!("{EXPERTS}.gate_up_proj");
    let down = format!("{EXPERTS}.down_proj");
    let bytes = |shape: &[usize]| weights(shape.iter().product(), 1);
    let tensor = |name: &'static str, shape: Vec<usize>| (name, "BF16", shape.clone(), bytes(&shape));
    for (shapes, names) in [
        // The inner widths, the numbers of experts, an odd number of rows, the other half.
        (vec![(&wide, vec![2, 64, 32]), (&down, vec![2, 32, 16])], &wide),
        (vec![(&wide, vec![2, 64, 32]), (&down, vec![3, 32, 32])], &wide),
        (vec![(&wide, vec![2, 63, 32]), (&down, vec![2, 32, 31])], &wide),
        (vec![(&wide, vec![2, 64, 32])], &wide),
        (vec![(&down, vec![2, 32, 32])], &down),
    ] {
        let home = tempdir().unwrap();
        let tensors: Vec<Named<'_>> =
            shapes.iter().map(|(name, shape)| (name.as_str(), "BF16", shape.clone(), bytes(shape))).collect();
        let config = write(&home.path().join("in"), "qwen3_5_moe", 2, &tensors);
        let outcome = run(&home.path().join("in"), &home.path().join("out"), &config, &quantize_options(1 << 40));
        message(outcome, names);
        assert!(!home.path().join("out").exists());
    }
    for (tensors, name) in [
        (
            vec![
                tensor("e.experts.0.w1.weight", vec![8, 4]),
                tensor("e.experts.0.w2.weight", vec![4, 8]),
                tensor("e.experts.0.w3.weight", vec![8, 4]),
                tensor("e.experts.1.w1.weight", vec![8, 4]),
                tensor("e.experts.1.w2.weight", vec![4, 8]),
                tensor("e.experts.1.w3.weight", vec![4, 4]),
            ],
            "e.experts.1.w3.weight",
        ),
        (
            vec![
                tensor("e.experts.0.w1.weight", vec![8, 4]),
                tensor("e.experts.0.w2.weight", vec![4, 8]),
                tensor("e.experts.0.w3.weight", vec![8, 4]),
                tensor("e.experts.1.w1.weight", vec![8, 4]),
                tensor("e.experts.1.w3.weight", vec![8, 4]),
            ],
            "e.experts.1.w2.weight",
        ),
        (
            vec![
                tensor("e.experts.0.w1.weight", vec![8, 4]),
                tensor("e.experts.0.w2.weight", vec![4, 8]),
                tensor("e.experts.0.w3.weight", vec![8, 4]),
            ],
            "e.experts.1.w3.weight",
        ),
    ] {
        let home = tempdir().unwrap();
        let config = write(home.path(), "mixtral", 2, &tensors);
        let plan = |path: &Path| {
            Plan::quantize(Checkpoint::open(path)?, Some(&config), &quantize_options(1 << 40), None).map(|_| ())
        };
        message(plan(home.path()), name);
        // One of several files may well lack some.
        let file = plan(&home.path().join("model.safetensors"));
        assert!(file.is_ok(), "{file:?}");
    }
}

#[test]
fn names_that_no_16_bit_loader_reads_are_told() {
    let notes = |model_type: &str, weight: &str| {
        let folder = tempdir().unwrap();
        let scales = weight.replace(".weight", ".SCB");
        let tensors = [(weight, "I8", vec![2, 64], vec![1; 128]), (&scales, "F32", vec![2], vec![0; 8])];
        let config = write(folder.path(), model_type, 1, &tensors);
        Plan::dequantize(Checkpoint::open(folder.path()).unwrap(), Some(&config), &dequantize_options(1 << 30))
            .unwrap()
            .notes
    };
    for (model_type, name) in [
        ("gpt_oss", "0.up_proj"),
        ("gpt_oss", "gate_up_projs.0"),
        ("qwen3_moe", "down_projs.31"),
        ("granitemoe", "0.down_proj"),
        ("llama4", "0.gate_proj"),
    ] {
        let weight = format!("{EXPERTS}.{name}.weight");
        let found = notes(model_type, &weight);
        assert!(found.len() == 1 && found[0].starts_with("1 weights of experts keep names"), "{found:?}");
        assert!(found[0].contains(&weight) && found[0].contains("model.dequantize()"), "{found:?}");
    }
    for (model_type, name) in [
        ("qwen3_moe", format!("{EXPERTS}.0.up_proj.weight")),
        ("mixtral", format!("{EXPERTS}.0.w1.weight")),
        ("something", format!("{EXPERTS}.0.up_proj.weight")),
        ("gpt_oss", "model.layers.0.self_attn.q_proj.weight".to_owned()),
        ("gpt_oss", "model.layers.0.down_projs.x.weight".to_owned()),
    ] {
        assert!(notes(model_type, &name).is_empty(), "{model_type} {name}");
    }
}

#[test]
fn what_a_file_says_of_fused_experts_is_not_trusted() {
    let home = tempdir().unwrap();
    let folder = home.path();
    let config = both(folder, HOW[0], SIZES[0]);
    run(&folder.join("fused"), &folder.join("q"), &config, &quantize_options(1 << 40)).unwrap();
    let bytes = fs::read(folder.join("q/model.safetensors")).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let record: Value = serde_json::from_str(header["__metadata__"][FUSED_KEY].as_str().unwrap()).unwrap();
    let name = format!("{EXPERTS}.gate_up_proj");
    for (field, value) in [
        ("shape", json!([0, 64, 64])),
        ("shape", json!([4, 64, 64])),
        ("shape", json!([3, 63, 64])),
        ("shape", json!([3, u64::MAX, 64])),
        ("shape", json!([3, 64])),
        ("projections", json!([])),
        ("projections", json!(["gate_proj", "gate_proj"])),
        ("projections", json!(["gate_proj", "up_proj", "x"])),
        ("experts", json!("elsewhere")),
        ("transposed", json!("yes")),
    ] {
        let mut record = record.clone();
        record[&name][field] = value.clone();
        let mut header = header.clone();
        header["__metadata__"][FUSED_KEY] = json!(record.to_string());
        let out = folder.join("bad");
        let _ = fs::remove_dir_all(&out);
        fs::create_dir(&out).unwrap();
        fs::write(out.join("model.safetensors"), file_bytes(&header.to_string(), &bytes[8 + len..])).unwrap();
        let plan = Plan::dequantize(Checkpoint::open(&out).unwrap(), Some(&config), &dequantize_options(1 << 40));
        let plan = plan.unwrap();
        let apart = plan.tensors.iter().any(|t| t.name.ends_with("experts.0.up_proj.weight"));
        assert!(apart, "{field} {value}");
    }
}
