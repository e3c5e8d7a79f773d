//! The memory plan: how memory is split, what `moebius plan` says, and that nothing grows past it.

#[cfg(feature = "server")]
#[path = "server/client.rs"]
#[allow(dead_code, reason = "shared with the server's tests")]
mod client;
#[path = "plan/command.rs"]
mod command;
#[cfg(all(feature = "server", target_os = "linux"))]
#[path = "plan/enforced.rs"]
mod enforced;

use std::path::PathBuf;

use kernels::attention::CacheType;
use models::batch::PAGE_TOKENS;
use models::{Model, Numerics};
use moebius::engine::EngineOptions;
use moebius::loaded::{DenseFormat, open_checkpoint};
use moebius::memory::outline::Outline;
use moebius::memory::{MemoryPlan, Residency, Weights, Wishes, fit_into};
use moebius::store::BlockStore;

const K2: &str = "full:moonshotai-Kimi-K2-Thinking";
const GPT_OSS: &str = "full:openai-gpt-oss-20b";
const MIB: usize = 1 << 20;
const GIB: usize = 1 << 30;

fn case(name: &str) -> String {
    format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A folder of this test's own, gone when it ends.
struct Temp(PathBuf);

impl Temp {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("moebius-plan-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

type Fitted = Result<(EngineOptions, MemoryPlan), String>;

fn fit(model: &str, available: Option<usize>, wishes: Wishes) -> Fitted {
    let outline = Outline::open(model).unwrap();
    let weights = outline.weights(DenseFormat::Published);
    let fitted = fit_into(available, &outline.config, weights, Numerics::Model, &wishes);
    let (options, plan) = fitted.map_err(|error| error.to_string())?;
    // What holds of every split.
    assert!(options.context <= options.blocks * PAGE_TOKENS, "one request fits: {options:?}");
    assert!(options.running <= options.step_tokens);
    assert_eq!(
        (plan.pool.blocks, plan.pool.cache_type),
        (options.blocks, wishes.cache_type.unwrap_or(CacheType::Bf16))
    );
    if let Some((window, blocks)) = options.window {
        assert_eq!(blocks, plan.pool.window_blocks);
        let one = (window + options.step_tokens).div_ceil(PAGE_TOKENS) + 1;
        assert!(blocks >= one.min(options.blocks), "one request's windows fit: {options:?}");
        assert!(blocks <= options.blocks);
    }
    if let Some(available) = available {
        assert!(plan.required_bytes() <= available);
    }
    if let Some(budget) = wishes.kv_memory {
        assert!(plan.pool.bytes() <= budget);
    }
    Ok((options, plan))
}

fn wishes(context: Option<usize>, kv_memory: Option<usize>, sequences: usize) -> Wishes {
    Wishes { context, kv_memory, sequences, ..Wishes::default() }
}

#[track_caller]
fn refused(fitted: Fitted, parts: &[&str]) {
    let message = fitted.unwrap_err();
    for part in parts {
        assert!(message.contains(part), "{part:?} in {message:?}");
    }
}

#[test]
fn k2_takes_what_its_shape_says() {
    let (options, plan) = fit(K2, None, wishes(Some(262_144), None, 1)).unwrap();
    assert_eq!(plan.pool.token_bytes(), 61 * 576 * 2);
    assert_eq!(plan.pool.token_bytes(), 70_272);
    assert_eq!(format!("{:.2}", plan.pool.bytes() as f64 / GIB as f64), "17.16");
    assert_eq!((options.blocks, options.window), (4096, None));
    let wide = Wishes { cache_type: Some(CacheType::F32), ..wishes(Some(262_144), None, 1) };
    assert_eq!(fit(K2, None, wide).unwrap().1.pool.bytes(), 2 * plan.pool.bytes());

    // 656 bytes per layer: half of that and the scales.
    let coarse = Wishes { cache_type: Some(CacheType::Fp8), ..wishes(Some(262_144), None, 1) };
    let (_, coarse) = fit(K2, None, coarse).unwrap();
    assert_eq!(coarse.pool.token_bytes(), 40_016);
    assert_eq!(format!("{:.2}", coarse.pool.bytes() as f64 / GIB as f64), "9.77");

    let outline = Outline::open(K2).unwrap();
    assert_eq!(
        (outline.parameters() / 1_000_000_000, outline.active_parameters() / 1_000_000_000),
        (1026, 32)
    );
    let weights = outline.weights(DenseFormat::Published);
    // 8 of 384 experts.
    assert_eq!(weights.token_expert_bytes * 48, weights.expert_bytes);
    let copied = outline.weights(DenseFormat::Q8);
    assert!(copied.token_bytes < weights.token_bytes && copied.copied_bytes < 10 * GIB);
    assert_eq!(copied.expert_bytes, weights.expert_bytes);
}

/// The outline counts by names and shapes what `bench::cost` counts by weights.
#[test]
fn both_ways_to_count_weights_agree() {
    let golden = std::fs::read_dir(case("")).unwrap().map(|entry| entry.unwrap().path());
    let folders = golden.filter(|folder| folder.join("config.json").is_file());
    let mut names: Vec<String> = folders.map(|folder| folder.to_str().unwrap().to_owned()).collect();
    names.push("demo".into());
    let mut compared = 0;
    for name in names {
        let Ok(outline) = Outline::open(&name) else { continue };
        let share = if name.contains("gpt_oss") { 15 } else { 50 };
        let published = Model::open(open_checkpoint(&name).unwrap()).unwrap();
        let q8 = Model::open_q8::<models::Error>(open_checkpoint(&name).unwrap(), |_| Ok(())).unwrap();
        for (model, dense) in [(&published, DenseFormat::Published), (&q8, DenseFormat::Q8)] {
            let (model, outline) = (Weights::of(model), outline.weights(dense));
            let exact = |weights: &Weights| {
                let Weights { mapped_bytes, copied_bytes, expert_bytes, token_expert_bytes, .. } = *weights;
                [mapped_bytes, copied_bytes, expert_bytes, token_expert_bytes]
            };
            // Vectors are widened to f32 when they are loaded, which counts where matrices are as small as these.
            for (model, outline) in exact(&model).into_iter().zip(exact(&outline)) {
                assert!(model.abs_diff(outline) <= outline / share, "{name} {dense:?}: {model} {outline}");
            }
            let (model, outline) = (model.token_bytes, outline.token_bytes);
            assert!(model.abs_diff(outline) <= outline / share, "{name} {dense:?}: {model} {outline}");
        }
        compared += 1;
    }
    assert!(compared >= 15, "only {compared} models");
}

#[test]
fn a_budget_is_spent_and_not_exceeded() {
    for (model, budget) in
        [(K2, GIB), (K2, 4_497_408), (GPT_OSS, GIB), (GPT_OSS, 64 * MIB), ("demo", 3 * MIB)]
    {
        for sequences in [1, 4, 64] {
            let (options, plan) = fit(model, None, wishes(None, Some(budget), sequences)).unwrap();
            let one_more = plan.pool.bytes() + plan.pool.block_bytes + plan.pool.window_block_bytes * 4;
            assert!(one_more > budget, "{model} {budget}: {plan:?}");
            let longest = Outline::open(model).unwrap().config.max_positions;
            assert_eq!(options.context, longest.min(32 * 1024).min(plan.pool.tokens()), "{model} {budget}");
        }
    }
    let (options, plan) = fit(K2, None, wishes(None, Some(GIB), 4)).unwrap();
    assert_eq!((options.context, plan.pool.tokens()), (15_232, 15_232), "238 blocks of 4,497,408 bytes");
    let (options, plan) = fit(K2, None, wishes(Some(1000), Some(GIB), 4)).unwrap();
    assert_eq!(
        (options.context, plan.pool.tokens()),
        (1000, 15_232),
        "the rest is for prefixes and other requests"
    );
}

#[test]
fn windows_are_paid_for() {
    let (options, plan) = fit(GPT_OSS, None, wishes(None, Some(GIB), 4)).unwrap();
    // Half of the layers see 128 tokens: a few per cent of the pool.
    assert_eq!(plan.pool.block_bytes, plan.pool.window_block_bytes);
    let (_, window_blocks) = options.window.unwrap();
    assert!(window_blocks * 10 < options.blocks, "{options:?}");
    assert!(window_blocks >= 4 * 4 + 8, "every running request has its window: {options:?}");
    let (more, _) = fit(GPT_OSS, None, wishes(None, Some(GIB), 64)).unwrap();
    assert!(more.window.unwrap().1 > window_blocks && more.blocks < options.blocks);
}

#[test]
fn pools_leave_the_weights_their_memory_where_both_fit() {
    let weights = Outline::open(GPT_OSS).unwrap().weights(DenseFormat::Published);
    let pool = |available: usize, context| {
        let (options, plan) = fit(GPT_OSS, Some(available), wishes(context, None, 4)).unwrap();
        (options.context, options.blocks * PAGE_TOKENS, plan.residency())
    };
    let context = 32 * 1024;
    assert_eq!(pool(64 * GIB, None), (context, 4 * context, Residency::Memory));
    // Room for the weights and more than one context, but not four.
    let (held, tokens, residency) = pool(weights.mapped_bytes + 3 * GIB, None);
    assert_eq!((held, residency), (context, Residency::Memory));
    assert!(tokens > context && tokens < 4 * context, "{tokens}");
    // Room for what each token reads, and four contexts.
    let (held, tokens, residency) = pool(12 * GIB, None);
    assert_eq!((held, tokens, residency), (context, 4 * context, Residency::ExpertsFromDisk));
    // Room for neither: one context of what there is.
    assert_eq!(pool(2 * GIB, None), (context, context, Residency::Disk));
    let (held, tokens, _) = pool(500 * MIB, None);
    assert!((2048..context).contains(&held) && tokens == held, "{held} {tokens}");
    assert_eq!(pool(2 * GIB, Some(16_384)).0, 16_384);
}

#[test]
fn what_cannot_fit_is_refused_with_the_numbers() {
    refused(
        fit(K2, None, wishes(Some(32_768), Some(GIB), 1)),
        &["--kv-memory 1.0 GiB holds 15,232 tokens", "--context 32768", "2.1 GiB"],
    );
    refused(
        fit(K2, None, wishes(None, Some(MIB), 1)),
        &["--kv-memory 1.0 MiB holds no block of 64", "4.3 MiB"],
    );
    refused(fit(K2, None, wishes(Some(300_000), None, 1)), &["--context 300000", "262,144"]);
    refused(fit(K2, None, wishes(Some(0), None, 1)), &["--context 0"]);
    refused(
        fit(K2, Some(8 * GIB), wishes(Some(262_144), None, 1)),
        &["17.2 GiB", "262,144 tokens", "8.0 GiB are"],
    );
    refused(fit(K2, Some(8 * GIB), wishes(None, Some(9 * GIB), 1)), &["9.0 GiB", "8.0 GiB are available"]);
    refused(fit(K2, Some(600 * MIB), wishes(None, None, 1)), &["2,048 tokens", "600.0 MiB are available"]);
}

#[test]
fn small_models_keep_their_whole_context() {
    for (name, context) in
        [("kimi_k2", None), ("gpt_oss_mxfp4", None), ("mixtral", None), ("gpt_oss_bf16", Some(70))]
    {
        let folder = case(name);
        let longest = Outline::open(&folder).unwrap().config.max_positions;
        for sequences in [1, 3] {
            let (options, plan) = fit(&folder, Some(GIB), wishes(context, None, sequences)).unwrap();
            assert_eq!(options.context, context.unwrap_or(longest.min(32 * 1024)), "{name}");
            assert_eq!(options.blocks, sequences * options.context.div_ceil(PAGE_TOKENS), "{name}");
            assert_eq!(plan.residency(), Residency::Memory, "{name}");
        }
    }
}

#[test]
fn a_store_has_its_buffers_planned() {
    let (_, without) = fit("demo", None, wishes(None, None, 1)).unwrap();
    let (_, with) = fit("demo", None, Wishes { store: true, ..wishes(None, None, 1) }).unwrap();
    assert_eq!(without.staging_bytes, 0);
    assert_eq!(with.staging_bytes, BlockStore::staging_bytes(with.pool.block_bytes) as usize);
    assert_eq!(with.required_bytes(), without.required_bytes() + with.staging_bytes);
    assert!(with.to_string().contains("staging"), "{with}");
}
