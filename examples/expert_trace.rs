//! Which experts a text goes to: a histogram per layer with routed experts.
//!
//! `cargo run --release --example expert_trace -- [MODEL] [TEXT]`

use moebius::error::Error;
use moebius::loaded::Loaded;
use moebius::session::SessionOptions;
use moebius::tokenizer::Specials;
use moebius::trace::{KeepLogits, TraceOptions, Tracer};

const TEXT: &str =
    "But soft, what light through yonder window breaks? It is the east, and Juliet is the sun.";

fn main() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let loaded = Loaded::open(&args.next().unwrap_or_else(|| "demo".into()))?;
    let text = args.next().unwrap_or_else(|| TEXT.into());

    let ids = loaded.tokenizer.encode(&text, Specials::Plain)?;
    let options = TraceOptions { logits: KeepLogits::None, ..TraceOptions::default() };
    let trace = Tracer::new(&loaded.model, &SessionOptions::default(), options, ids.len())?.trace(&ids)?;

    for (index, layer) in trace.layers.iter().enumerate().filter(|(_, layer)| layer.top_k > 0) {
        let experts = 1 + layer.ids.iter().copied().max().unwrap_or(0) as usize;
        let mut counts = vec![0usize; experts];
        layer.ids.iter().for_each(|&id| counts[id as usize] += 1);
        let used = counts.iter().filter(|count| **count > 0).count();
        let mean = layer.ids.len() as f64 / experts as f64;
        let busiest = counts.iter().copied().max().unwrap_or(0) as f64 / mean;
        println!(
            "layer {index}: {used} of {experts} experts for {} tokens, busiest {busiest:.1}x the mean",
            ids.len()
        );
        println!("  {}", counts.iter().map(|&count| bar(count as f64 / mean)).collect::<String>());
    }
    Ok(())
}

/// A block as high as `share`, where 1 is half the height.
fn bar(share: f64) -> char {
    let height = (share * 4.0).round().clamp(0.0, 8.0) as usize;
    [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'][height]
}
