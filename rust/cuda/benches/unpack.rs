//! How long the code of kernels takes to unpack when it is first used, as a table: without a GPU, for one that is named.
//!
//!     HALFBYTE_CUBINS=all cargo bench -p halfbyte-cuda --bench unpack -- 9.0

use std::time::{Duration, Instant};

use halfbyte_cuda::{Capability, Form, kernels};

/// What is faster has been unpacked along with another kernel: only its checksum is computed.
const UNPACKED: f64 = 0.05;

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn main() {
    let asked = std::env::args().skip(1).find_map(|argument| {
        let (major, minor) = argument.split_once('.')?;
        Some(Capability(major.parse().ok()?, minor.parse().ok()?))
    });
    let device = asked.unwrap_or(Capability(9, 0));
    for form in [Form::Cubin, Form::Ptx] {
        let mut taken = Vec::new();
        for kernel in &kernels::ALL {
            let Some(image) = kernel.image(form, device).filter(|image| image.is_built()) else {
                continue;
            };
            let start = Instant::now();
            match image.code() {
                Ok(code) => taken.push((milliseconds(start.elapsed()), kernel.name, code.len())),
                Err(why) => panic!("{} {why}", kernel.name),
            }
        }
        let (count, bytes) = (taken.len(), taken.iter().map(|(_, _, bytes)| bytes).sum::<usize>());
        taken.retain(|(time, _, _)| *time >= UNPACKED);
        taken.sort_by(|a, b| b.0.total_cmp(&a.0));
        let total: f64 = taken.iter().map(|(time, _, _)| time).sum();
        let form = form.as_str();
        println!(
            "{count} kernels as {form} for {device}, {} KiB: {} sources in {total:.1} ms\n",
            bytes >> 10,
            taken.len()
        );
        println!("| first kernel of a source                 |    ms |");
        println!("|------------------------------------------|------:|");
        for (time, name, _) in &taken {
            println!("| {name:40} | {time:5.2} |");
        }
        println!();
    }
}
