//! The table of cases: which operations, shapes and numbers of rows.

use kernels::attention::{CacheSlice, Gqa, Mla, PAGE, Pages, Queries, gqa, mla};
use kernels::experts::{Activation, Dispatch, DispatchLimits, ExpertFfn, GateUp, Routed, run_experts};
use kernels::matmul::{Heads, matmul, matmul_heads, matmul_transposed, matmul_transposed_heads, matmul_with};
use kernels::norm::rms_norm;
use kernels::quantised::Activations;
use kernels::rope::{Rotation, rotate};
use kernels::route::{Normalise, RouterRule, Score, route};
use kernels::{Rows, RowsMut};

use super::weights::{FORMATS, Format, Stored, activations, cached};
use super::{Ops, OpsOptions, PATHS};
use crate::ceilings::Work;
use crate::cost::stored_bytes;
use crate::seeded::Seeded;
use crate::{Error, Sink};

/// Name, rows and columns of products.
type Shape = (&'static str, usize, usize);

const SHAPES: [Shape; 5] = [
    ("k2-expert-up", 2048, 7168),
    ("k2-o", 7168, 8192),
    ("k2-kv-a", 576, 7168),
    ("qwen-q", 4096, 2048),
    ("qwen-expert-down", 2048, 768),
];
const QUICK_SHAPES: [Shape; 1] = [("tiny", 160, 96)];
/// Rows of activations.
const ROWS: [usize; 7] = [1, 2, 4, 8, 16, 64, 512];
const QUICK_ROWS: [usize; 2] = [1, 3];

/// A layer's routed experts.
#[derive(Clone, Copy)]
struct Family {
    name: &'static str,
    hidden: usize,
    inter: usize,
    experts: usize,
    top_k: usize,
    score: Score,
}

const FAMILIES: [Family; 2] = [
    Family { name: "k2", hidden: 7168, inter: 2048, experts: 384, top_k: 8, score: Score::Sigmoid },
    Family { name: "qwen", hidden: 2048, inter: 768, experts: 128, top_k: 8, score: Score::Softmax },
];
const QUICK_FAMILIES: [Family; 1] =
    [Family { name: "tiny", hidden: 96, inter: 64, experts: 8, top_k: 2, score: Score::Sigmoid }];
/// Rows of every expert: 11 and 43 are those of prompts of 512 and 2048 tokens through K2's experts.
const EXPERT_ROWS: [usize; 7] = [1, 2, 4, 8, 11, 16, 43];
/// Rows of every expert from which on only a quarter of the experts run: the buffers grow with the pairs. So in the
/// larger formats.
const MANY_EXPERT_ROWS: usize = 12;

/// All rows that the options ask for.
///
/// # Errors
/// If there is no memory, the filter matches nothing, or a row cannot be written.
pub fn measure(options: &OpsOptions, sink: &mut dyn Sink) -> Result<(), Error> {
    let mut count = 0;
    for path in PATHS {
        let mut ops = Ops::new(options, path, sink)?;
        products(&mut ops)?;
        let exact = path.numerics.precision().is_none();
        if exact {
            heads(&mut ops)?;
        }
        let families: &[Family] = if options.quick { &QUICK_FAMILIES } else { &FAMILIES };
        for family in families {
            experts(&mut ops, family)?;
            if exact {
                router(&mut ops, family)?;
                small(&mut ops, family)?;
            }
        }
        if exact {
            attention(&mut ops)?;
        }
        count += ops.count;
    }
    match &options.filter {
        Some(filter) if count == 0 && !sink.stopped() => Err(Error::Unsupported(format!(
            "no row's name contains {filter:?}; without a filter all rows are measured"
        ))),
        _ => Ok(()),
    }
}

fn work(bytes: usize, operations: usize) -> Work {
    Work { bytes: bytes as u64, operations: operations as u64 }
}

fn rows_of(ops: &Ops<'_>) -> &'static [usize] {
    if ops.options.quick { &QUICK_ROWS } else { &ROWS }
}

fn products(ops: &mut Ops<'_>) -> Result<(), Error> {
    let quick = ops.options.quick;
    let shapes: &[Shape] = if quick { &QUICK_SHAPES } else { &SHAPES };
    for &(shape, rows, cols) in shapes {
        for format in FORMATS {
            let precision = ops.path.numerics.precision();
            let Some(peak) = ops.peak(format) else { continue };
            let bytes = stored_bytes(&ops.stored.matrix(format, (rows, cols), 0));
            for &tokens in rows_of(ops) {
                let work = work(bytes, 2 * tokens * rows * cols);
                let name = format!("matmul/{shape}/{}/m{tokens}", format.as_str());
                if ops.wants(&name) {
                    let (x, mut out) = (activations(tokens * cols), vec![0.0; tokens * rows]);
                    let mut room = Activations::new(precision, tokens, cols);
                    ops.time_against(peak, &name, work, |stored, isa, run| {
                        let w = stored.matrix(format, (rows, cols), run);
                        let (x, out) = (Rows::new(&x, cols), RowsMut::new(&mut out, rows));
                        matmul_with(isa, Some(&mut room), x, &w, None, out);
                    })?;
                }
                let name = format!("transposed/{shape}/{}/m{tokens}", format.as_str());
                // Only experts are ever stored so.
                if precision.is_none() && (quick || shape.contains("expert")) && ops.wants(&name) {
                    let (x, mut out) = (activations(tokens * rows), vec![0.0; tokens * cols]);
                    ops.time(&name, work, |stored, isa, run| {
                        let w = stored.matrix(format, (rows, cols), run);
                        matmul_transposed(isa, &x, &w, None, &mut out);
                    })?;
                }
            }
        }
    }
    Ok(())
}

/// W_UK and W_UV of latent attention: one matrix `[heads * (nope + value), rank]`.
fn heads(ops: &mut Ops<'_>) -> Result<(), Error> {
    let (shape, count, nope, value, rank) =
        if ops.options.quick { ("tiny", 2, 32, 32, 64) } else { ("k2", 64, 128, 128, 512) };
    let step = nope + value;
    for format in [Format::Bf16, Format::Fp8] {
        for &tokens in rows_of(ops) {
            let name = format!("heads-uk/{shape}/{}/m{tokens}", format.as_str());
            let bytes = |width: usize| count * stored_bytes(&ops.stored.matrix(format, (width, rank), 0));
            let products = |width: usize| 2 * tokens * count * width * rank;
            let (uk, uv) = (work(bytes(nope), products(nope)), work(bytes(value), products(value)));
            if ops.wants(&name) {
                let (x, mut out) = (activations(tokens * count * nope), vec![0.0; tokens * count * rank]);
                let heads = Heads { count, x_step: nope, w_step: step, out_step: rank };
                ops.time(&name, uk, |stored, isa, run| {
                    let w = stored.matrix(format, (count * step, rank), run).slice(0, nope);
                    let (x, out) = (Rows::new(&x, count * nope), RowsMut::new(&mut out, count * rank));
                    matmul_transposed_heads(isa, &heads, x, &w, out);
                })?;
            }
            let name = format!("heads-uv/{shape}/{}/m{tokens}", format.as_str());
            if ops.wants(&name) {
                let (x, mut out) = (activations(tokens * count * rank), vec![0.0; tokens * count * value]);
                let heads = Heads { count, x_step: rank, w_step: step, out_step: value };
                ops.time(&name, uv, |stored, isa, run| {
                    let w = stored.matrix(format, (count * step, rank), run).slice(nope, value);
                    let (x, out) = (Rows::new(&x, count * rank), RowsMut::new(&mut out, count * value));
                    matmul_heads(isa, &heads, x, &w, out);
                })?;
            }
        }
    }
    Ok(())
}

fn expert<'a>(stored: &'a Stored, family: &Family, format: Format, id: usize) -> ExpertFfn<'a> {
    let (up, down) = ((family.inter, family.hidden), (family.hidden, family.inter));
    ExpertFfn {
        gate_up: GateUp::Separate {
            gate: stored.matrix(format, up, 3 * id),
            up: stored.matrix(format, up, 3 * id + 1),
        },
        gate_up_bias: None,
        down: stored.matrix(format, down, 3 * id + 2),
        down_transposed: false,
        down_bias: None,
        activation: Activation::SiluGlu,
    }
}

fn experts(ops: &mut Ops<'_>, family: &Family) -> Result<(), Error> {
    let Family { name, experts, top_k, .. } = *family;
    for format in [Format::Int4, Format::Mxfp4, Format::Fp8, Format::Bf16] {
        let format_name = format.as_str();
        // One token: other experts at every run.
        let one = move |run: usize| (0..top_k).map(|rank| ((run * top_k + rank) % experts) as u32).collect();
        run_case(ops, family, format, (format!("experts/{name}/{format_name}/decode"), top_k), &one)?;
        let int4 = format == Format::Int4;
        let all: &[usize] = if int4 { &EXPERT_ROWS } else { &[4, 11] };
        for &rows in if ops.options.quick { &QUICK_ROWS } else { all } {
            let whole = int4 && rows < MANY_EXPERT_ROWS;
            let active = if whole { experts } else { (experts / 4).next_multiple_of(top_k) };
            let row = format!("experts/{name}/{format_name}/{active}x{rows}");
            let even =
                move |_| (0..active * rows / top_k * top_k).map(|pair| (pair % active) as u32).collect();
            run_case(ops, family, format, (row, active), &even)?;
        }
    }
    // A prompt's uneven groups.
    for tokens in if ops.options.quick { [5, 9] } else { [512, 2048] } {
        let row = format!("experts/{name}/int4/prefill-{tokens}");
        let random = move |run| routes(run, tokens, top_k, experts);
        let mut used = random(0);
        used.sort_unstable();
        used.dedup();
        run_case(ops, family, Format::Int4, (row, used.len()), &random)?;
    }
    Ok(())
}

/// Random experts for every token, none twice.
fn routes(seed: usize, tokens: usize, top_k: usize, experts: usize) -> Vec<u32> {
    let mut seeded = Seeded::new(seed as u64);
    let mut ids = Vec::with_capacity(tokens * top_k);
    for token in 0..tokens {
        while ids.len() < (token + 1) * top_k {
            let id = seeded.below(experts);
            if !ids[token * top_k..].contains(&id) {
                ids.push(id);
            }
        }
    }
    ids
}

/// `ids` gives the experts of all tokens in a run; `active` is how many distinct ones.
fn run_case(
    ops: &mut Ops<'_>,
    family: &Family,
    format: Format,
    (row, active): (String, usize),
    ids: &(dyn Fn(usize) -> Vec<u32> + Sync),
) -> Result<(), Error> {
    let precision = ops.path.numerics.precision();
    let Some(peak) = ops.peak(format).filter(|_| ops.wants(&row)) else { return Ok(()) };
    let Family { hidden, inter, experts, top_k, .. } = *family;
    let pairs = ids(0).len();
    let tokens = pairs / top_k;
    let (x, mut out) = (activations(tokens * hidden), vec![0.0; tokens * hidden]);
    let gates = vec![1.0 / top_k as f32; pairs];
    let floats = !format.is_quantised();
    let limits = DispatchLimits { tokens, top_k, experts, hidden, inter, precision, floats };
    let mut dispatch = Dispatch::new(limits);
    let bytes = 3 * stored_bytes(&ops.stored.matrix(format, (inter, hidden), 0));
    ops.time_against(peak, &row, work(active * bytes, 6 * pairs * hidden * inter), |stored, isa, run| {
        let ids = ids(run);
        let lookup = |id: u32| expert(stored, family, format, id as usize);
        run_experts(
            isa,
            Routed { x: &x, ids: &ids, weights: &gates },
            &lookup,
            None,
            &mut dispatch,
            &mut out,
        );
    })
}

/// Router logits and the choice.
fn router(ops: &mut Ops<'_>, family: &Family) -> Result<(), Error> {
    let Family { name, hidden, experts, top_k, score, .. } = *family;
    let normalise = Some(Normalise::Epsilon(1e-20));
    let rule = RouterRule { experts, top_k, score, groups: None, normalise, scale: 1.0 };
    for &tokens in rows_of(ops) {
        let row = format!("router/{name}/m{tokens}");
        if !ops.wants(&row) {
            continue;
        }
        let (x, mut logits) = (activations(tokens * hidden), vec![0.0; tokens * experts]);
        let (mut ids, mut weights) = (vec![0; top_k], vec![0.0; top_k]);
        let mut scratch = vec![0.0; rule.scratch_len()];
        let shape = (experts, hidden);
        let work = work(2 * experts * hidden, 2 * tokens * experts * hidden);
        ops.time(&row, work, |stored, isa, run| {
            matmul(isa, &x, &stored.matrix(Format::Bf16, shape, run), None, &mut logits);
            for logits in logits.chunks_exact(experts) {
                route(isa, &rule, logits, None, &mut scratch, &mut ids, &mut weights);
            }
        })?;
    }
    Ok(())
}

/// Norm and rotation: over activations in a cache, so that no ceiling of ours binds.
fn small(ops: &mut Ops<'_>, family: &Family) -> Result<(), Error> {
    let (name, hidden) = (family.name, family.hidden);
    for &tokens in rows_of(ops) {
        let row = format!("norm/{name}/m{tokens}");
        if ops.wants(&row) {
            let (x, weight) = (activations(tokens * hidden), activations(hidden));
            let mut out = vec![0.0; tokens * hidden];
            ops.time(&row, work(4 * tokens * hidden, 4 * tokens * hidden), |_, isa, _| {
                rms_norm(isa, &x, Some(&weight), 1e-6, hidden, &mut out);
            })?;
        }
        let row = format!("rope/{name}/m{tokens}");
        if ops.wants(&row) {
            let (style, heads, dim) = if family.score == Score::Sigmoid {
                (Rotation::Interleaved, 65, 64)
            } else {
                (Rotation::Half, 36, 128)
            };
            let mut x = activations(tokens * heads * dim);
            let (cos, sin) = (vec![0.8; dim / 2], vec![0.6; dim / 2]);
            ops.time(&row, work(4 * x.len(), 3 * x.len()), |_, _, _| {
                x.chunks_exact_mut(dim).for_each(|head| rotate(head, &cos, &sin, style));
            })?;
        }
    }
    Ok(())
}

/// Tokens and cached positions, the tokens' own included.
const ATTENTION: [(&str, usize, usize); 4] = [
    ("decode-2048", 1, 2048),
    ("decode-32768", 1, 32768),
    ("prefill-512", 512, 512),
    ("prefill-512-at-7680", 512, 8192),
];
const QUICK_ATTENTION: [(&str, usize, usize); 2] = [("decode-100", 1, 100), ("prefill-20", 20, 20)];

fn attention(ops: &mut Ops<'_>) -> Result<(), Error> {
    let quick = ops.options.quick;
    let kinds = ["attention/mla", "attention/gqa"];
    let cases: &[(&str, usize, usize)] = if quick { &QUICK_ATTENTION } else { &ATTENTION };
    let wanted = |ops: &Ops<'_>| {
        kinds.iter().any(|kind| cases.iter().any(|case| ops.wants(&format!("{kind}/{}", case.0))))
    };
    if !wanted(ops) {
        return Ok(());
    }
    let cache = cached(if quick { 1 << 19 } else { 192 << 20 });
    let latent = Mla { heads: 64, latent: 512, rope: 64, scale: 0.07 };
    let grouped =
        Gqa { heads: 32, kv_heads: 4, head_dim: 128, value_dim: 128, scale: 0.09, window: None, sinks: None };
    for &(case, tokens, context) in cases {
        let first_position = context - tokens;
        // Sum over the tokens of the positions that each sees.
        let seen = tokens * (first_position + 1 + context) / 2;
        let name = format!("attention/mla/{case}");
        if ops.wants(&name) {
            let (heads, row) = (latent.heads, latent.latent + latent.rope);
            let x = activations(tokens * heads * row);
            let mut out = vec![0.0; tokens * heads * latent.latent];
            let mut scratch = vec![0.0; latent.scratch_len(tokens, context)];
            let work = work(2 * context * row, 2 * seen * heads * (row + latent.latent));
            ops.time(&name, work, |_, isa, run| {
                let table = table(&cache, row, context, run);
                let pages = Pages { data: CacheSlice::Bf16(&cache), row, table: &table };
                mla(isa, &latent, Queries { rows: &x, first_position }, &pages, &mut scratch, &mut out);
            })?;
        }
        let name = format!("attention/gqa/{case}");
        if ops.wants(&name) {
            let (heads, width, row) = (grouped.heads, grouped.head_dim, grouped.kv_heads * grouped.head_dim);
            let x = activations(tokens * heads * width);
            let mut out = vec![0.0; tokens * heads * width];
            let mut scratch = vec![0.0; grouped.scratch_len(tokens, context)];
            let work = work(4 * context * row, 4 * seen * heads * width);
            ops.time(&name, work, |_, isa, run| {
                let tables = [2 * run, 2 * run + 1].map(|copy| table(&cache, row, context, copy));
                let pages = |i: usize| Pages { data: CacheSlice::Bf16(&cache), row, table: &tables[i] };
                let (queries, pages) = (Queries { rows: &x, first_position }, (&pages(0), &pages(1)));
                gqa(isa, &grouped, queries, pages, &mut scratch, &mut out);
            })?;
        }
    }
    Ok(())
}

/// Part `copy` of the cache as the blocks of one sequence.
fn table(cache: &[u16], row: usize, context: usize, copy: usize) -> Vec<u32> {
    let (blocks, all) = (context.div_ceil(PAGE), cache.len() / (row * PAGE));
    let first = copy % (all / blocks) * blocks;
    (first..first + blocks).map(|block| block as u32).collect()
}
