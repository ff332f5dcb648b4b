//! Headers that lie, one way each.

use std::fs;
use std::path::Path;

use super::super::reader::header::{SourceFile, parse};
use super::{file_bytes, message};

/// Writes a file, opens it, and gives the message of the refusal.
fn refused(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.safetensors");
    fs::write(&path, bytes).unwrap();
    message(SourceFile::open(&path), "bad.safetensors")
}

fn entry(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
}

#[test]
fn refused_headers_say_why() {
    let u8s = |offsets: &str, n: usize| entry("U8", &format!("[{n}]"), offsets);
    let two = |a: String, b: String| format!(r#"{{"a":{a},"b":{b}}}"#);
    let one = |a: String| format!(r#"{{"the.tensor":{a}}}"#);
    let deep = format!(r#"{{"a":{}1{}}}"#, "[".repeat(5000), "]".repeat(5000));
    let many = format!("[{}]", vec!["1"; 65].join(","));
    // Header, bytes of data, words of the message.
    let cases: Vec<(String, usize, &[&str])> = vec![
        (one(u8s("[0,8]", 8)), 7, &["the.tensor", "[0, 8]", "7 bytes"]),
        (one(u8s("[0,8]", 8)), 9, &["9 bytes", "no tensor owns"]),
        (one(u8s("[8,0]", 8)), 8, &["the.tensor", "reversed", "[8, 0]"]),
        (one(u8s("[0,18446744073709551615]", 8)), 8, &["the.tensor", "18446744073709551615"]),
        (one(u8s("[18446744073709551615,18446744073709551615]", 0)), 8, &["the.tensor"]),
        (one(u8s("[0,18446744073709551616]", 8)), 8, &["the.tensor", "valid"]),
        (one(u8s("[0,1e1]", 8)), 8, &["the.tensor", "floating point"]),
        (one(u8s("[0,8,16]", 8)), 8, &["the.tensor"]),
        (one(u8s("[0]", 8)), 8, &["the.tensor"]),
        (one(u8s("[1,9]", 8)), 9, &["the.tensor", "hole"]),
        (two(u8s("[0,8]", 8), u8s("[7,15]", 8)), 15, &["\"b\"", "overlap", "8"]),
        (two(u8s("[0,8]", 8), u8s("[0,8]", 8)), 8, &["\"b\"", "overlap"]),
        (two(u8s("[0,8]", 8), u8s("[9,17]", 8)), 17, &["\"b\"", "hole"]),
        (one(entry("U8", "[9]", "[0,8]")), 8, &["the.tensor", "[9]", "takes 9"]),
        (one(entry("F32", "[3]", "[0,8]")), 8, &["the.tensor", "F32", "takes 12"]),
        (one(entry("F4", "[3]", "[0,1]")), 1, &["the.tensor", "whole number of bytes"]),
        (one(entry("U8", "[4294967296,4294967296]", "[0,8]")), 8, &["the.tensor", "overflows"]),
        (one(entry("F64", "[2305843009213693952]", "[0,0]")), 0, &["the.tensor", "overflows"]),
        (one(entry("U8", "[-1]", "[0,8]")), 8, &["the.tensor", "-1"]),
        (one(entry("U8", "[8.0]", "[0,8]")), 8, &["the.tensor", "8.0"]),
        (one(entry("U8", "[null]", "[0,8]")), 8, &["the.tensor", "null"]),
        (one(entry("U8", "null", "[0,8]")), 8, &["the.tensor", "null"]),
        (one(entry("U8", "[99999999999999999999]", "[0,8]")), 8, &["the.tensor"]),
        (one(entry("U8", &many, "[0,1]")), 1, &["the.tensor", "65 dimensions", "64"]),
        (one(entry("U7", "[8]", "[0,8]")), 8, &["the.tensor", "U7", "BF16"]),
        (one(entry("bfloat16", "[4]", "[0,8]")), 8, &["the.tensor", "bfloat16", "BF16"]),
        (one(r#"{"dtype":7,"shape":[8],"data_offsets":[0,8]}"#.into()), 8, &["the.tensor", "7"]),
        (one(r#"{"shape":[8],"data_offsets":[0,8]}"#.into()), 8, &["the.tensor", "dtype"]),
        (one(r#"{"dtype":"U8","data_offsets":[0,8]}"#.into()), 8, &["the.tensor", "shape"]),
        (one(r#"{"dtype":"U8","shape":[8]}"#.into()), 8, &["the.tensor", "data_offsets"]),
        (
            one(r#"{"dtype":"U8","dtype":"U8","shape":[8],"data_offsets":[0,8]}"#.into()),
            8,
            &["the.tensor", "duplicate"],
        ),
        (one(r#"{"dtype":"U8","shape":[8],"data_offsets":[0,8],"x\n\u001b":1}"#.into()), 8, &["the.tensor", "unknown"]),
        (one("null".into()), 0, &["the.tensor", "null"]),
        (format!(r#"{{"a":{0},"\u0061":{0}}}"#, u8s("[0,8]", 8)), 8, &["two tensors named \"a\""]),
        (r#"{"__metadata__":{"a":1}}"#.into(), 0, &["valid"]),
        (r#"{"__metadata__":{"a":null}}"#.into(), 0, &["null"]),
        (r#"{"__metadata__":[]}"#.into(), 0, &["valid"]),
        (r#"{"__metadata__":{"a":"1","a":"2"}}"#.into(), 0, &["two entries named \"a\""]),
        (r#"{"__metadata__":{},"__metadata__":{}}"#.into(), 0, &["two entries named \"__metadata__\""]),
        (r#"{"__metadata__":null,"__metadata__":null}"#.into(), 0, &["two entries named"]),
        (deep, 0, &["valid"]),
        ("[]".into(), 0, &["'{'"]),
        (" {}".into(), 0, &["'{'"]),
        ("{".into(), 0, &["EOF"]),
        ("{}{}".into(), 0, &["trailing"]),
        ("{}\0".into(), 0, &["trailing"]),
        ("{\"a\":}".into(), 0, &["valid"]),
        (r#"{"\ud800":1}"#.into(), 0, &["valid"]),
        (String::new(), 0, &["'{'"]),
    ];
    for (header, data, words) in cases {
        let text = refused(&file_bytes(&header, &vec![0; data]));
        for word in words {
            assert!(text.contains(word), "{header:.100}: {text}: expected {word:?}");
        }
        assert!(text.len() < 1500, "{text}");
        let buffer = file_bytes(&header, &vec![0; data]);
        let stricter = ["two ", "'{'", "65 dimensions", "unknown", "duplicate"].iter().any(|w| text.contains(w));
        assert!(stricter || safetensors::SafeTensors::deserialize(&buffer).is_err(), "safetensors reads {header:.200}");
    }
}

#[test]
fn files_that_are_too_short_say_so() {
    assert!(refused(b"").contains("0 bytes long"));
    assert!(refused(&[2, 0, 0, 0, 0, 0, 0]).contains("7 bytes long"));
    assert!(refused(&[2, 0, 0, 0, 0, 0, 0, 0]).contains("cut short"));
    assert!(refused(&[2, 0, 0, 0, 0, 0, 0, 0, b'{']).contains("only 1 follow"));
    assert!(refused(&[0xff; 8]).contains("18446744073709551615"));
    assert!(refused(&100_000_001u64.to_le_bytes()).contains("at most 100000000"));
    assert!(refused(&file_bytes("{}", b"")[..9]).contains("cut short"));
    assert!(refused(&[2, 0, 0, 0, 0, 0, 0, 0]).ends_with("and only 0 follow; save, or download, it again"));
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    assert!(refused(pointer).contains("is a Git LFS pointer and not the weights: fetch them with `git lfs pull`"));
    assert!(refused(b"PK\x03\x04 this is a zip archive").contains("no safetensors file"));
    let mut latin = file_bytes("{\"e\":1}", b"");
    latin[10] = 0xe9;
    assert!(refused(&latin).contains("UTF-8 (byte 2)"));
}

#[test]
fn every_truncation_of_a_file_is_refused() {
    let header = format!(r#"{{"a":{}}}"#, entry("F32", "[2,2]", "[0,16]"));
    let whole = file_bytes(&header, &[1; 16]);
    for len in 0..whole.len() {
        refused(&whole[..len]);
    }
}

#[test]
fn what_the_format_allows_is_read() {
    let ok = |header: &str, data: u64| parse(Path::new("x"), header.as_bytes(), data).unwrap();
    assert!(ok("{}  \n\t ", 0).0.is_empty());
    assert_eq!(ok(r#"{"__metadata__":null}"#, 0).1.len(), 0);
    assert_eq!(ok(r#"{"__metadata__":{"\n":"é"}}"#, 0).1["\n"], "é");
    let shape = format!("[{}]", vec!["1"; 64].join(","));
    let all = format!(
        r#"{{"last":{},"scalar":{},"empty":{},"wide":{},"half":{},"huge and empty":{},"":{}}}"#,
        entry("U8", "[2]", "[7,9]"),
        entry("F32", "[]", "[0,4]"),
        entry("F64", "[3,0]", "[4,4]"),
        entry("BOOL", &shape, "[4,5]"),
        entry("F4", "[4]", "[5,7]"),
        entry("F64", "[0,18446744073709551615]", "[4,4]"),
        entry("U8", "[0]", "[9,9]"),
    );
    let (tensors, _) = ok(&all, 9);
    let names: Vec<&str> = tensors.iter().map(|(n, _)| n.as_str()).collect();
    assert_eq!(names, ["scalar", "empty", "huge and empty", "wide", "half", "last", ""]);
}
