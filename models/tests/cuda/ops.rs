//! Products and attention as the chain calls them: shapes from the description, the rest from the layer below.

use half::bf16;
use kernels::attention::{CacheType, Mla as LatentShape, PAGE};
use kernels::cuda::{
    Buffer, Dense, DenseGateUp, DenseHeads, DenseInput, DenseValues, DenseWeight, DenseWorkspace,
    DenseWorkspaceSize, Device, DeviceError, ExpertFormat, GroupedAttention, LatentAttention, Places, Planes,
    Slice, Strided,
};
use kernels::experts::Activation;
use models::config::{Gqa, Mla};

use crate::chain::Inputs;
use crate::weights::{DeviceMlp, DeviceWeight};

type Result<T> = std::result::Result<T, DeviceError>;

/// Enough for the products of the golden cases.
const SUMS: DenseWorkspaceSize = DenseWorkspaceSize { sums: 1 << 20, counters: 1 << 12 };

/// Memory that products and attention share.
pub struct Workspace {
    dense: DenseWorkspace,
    attention: Buffer<f32>,
    blocks: usize,
}

impl Workspace {
    pub fn new(device: &Device, blocks: usize) -> Result<Self> {
        Ok(Self { dense: DenseWorkspace::new(device, SUMS)?, attention: device.alloc(1 << 20)?, blocks })
    }

    fn places<'a>(&self, inputs: &'a Inputs) -> Places<'a> {
        Places {
            positions: inputs.positions.all(),
            sequences: inputs.sequences.all(),
            tables: inputs.tables.all(),
            pages: self.blocks,
            context: self.blocks * PAGE,
        }
    }
}

fn view(weight: &DeviceWeight) -> DenseWeight<'_> {
    let values = match (weight.format, &weight.scales) {
        (ExpertFormat::Bf16, _) => DenseValues::Bf16(weight.codes.all().cast::<bf16>()),
        (ExpertFormat::Fp8, Some(scales)) => {
            DenseValues::Fp8 { codes: weight.codes.all(), scales: scales.all().cast() }
        }
        _ => panic!("dense weights are bf16 or FP8"),
    };
    DenseWeight { values, rows: weight.rows, cols: weight.cols }
}

pub fn dense(
    device: &Device,
    workspace: &Workspace,
    x: Planes<'_>,
    tokens: usize,
    weight: &DeviceWeight,
    out: Strided<'_>,
    add: bool,
) -> Result<()> {
    let bias = weight.bias.as_ref().map(Buffer::all);
    let (x, weight, workspace) = (DenseInput::new(x, weight.cols), view(weight), &workspace.dense);
    Dense { x, tokens, weight, bias, out, add, workspace }.launch(device)
}

pub fn pair(
    device: &Device,
    workspace: &Workspace,
    x: Planes<'_>,
    tokens: usize,
    mlp: &DeviceMlp,
    activation: Activation,
    out: Planes<'_>,
) -> Result<()> {
    let (gate, up) = (view(&mlp.gate), view(&mlp.up));
    let (x, out_stride, workspace) = (DenseInput::new(x, gate.cols), gate.rows, &workspace.dense);
    DenseGateUp { x, tokens, gate, up, bias: None, activation, out, out_stride, workspace }.launch(device)
}

/// Queries into the latent space: `[tokens, heads, nope]` to the first values of rows of `out`, one per head.
pub fn absorb(
    device: &Device,
    workspace: &Workspace,
    x: Planes<'_>,
    tokens: usize,
    mla: &Mla,
    kv_b: &DeviceWeight,
    out: Strided<'_>,
) -> Result<()> {
    let per_head = mla.nope_dim + mla.value_dim;
    DenseHeads {
        x: DenseInput::new(x, mla.heads * mla.nope_dim),
        x_head_stride: mla.nope_dim,
        tokens,
        weight: view(kv_b),
        first_row: 0,
        row_stride: per_head,
        rows: mla.nope_dim,
        heads: mla.heads,
        transposed: true,
        out: Strided::new(out.values, mla.heads * out.stride),
        out_head_stride: out.stride,
        workspace: &workspace.dense,
    }
    .launch(device)
}

/// Out of the latent space: `[tokens, heads, rank]` to `[tokens, heads, value]`.
pub fn expand(
    device: &Device,
    workspace: &Workspace,
    x: Planes<'_>,
    tokens: usize,
    mla: &Mla,
    kv_b: &DeviceWeight,
    out: Strided<'_>,
) -> Result<()> {
    DenseHeads {
        x: DenseInput::new(x, mla.heads * mla.kv_rank),
        x_head_stride: mla.kv_rank,
        tokens,
        weight: view(kv_b),
        first_row: mla.nope_dim,
        row_stride: mla.nope_dim + mla.value_dim,
        rows: mla.value_dim,
        heads: mla.heads,
        transposed: false,
        out: Strided::new(out.values, mla.heads * out.stride),
        out_head_stride: out.stride,
        workspace: &workspace.dense,
    }
    .launch(device)
}

pub fn latent_attention(
    device: &Device,
    workspace: &Workspace,
    mla: &Mla,
    inputs: &Inputs,
    (kind, cache): (CacheType, Slice<'_, u8>),
    queries: &Buffer<f32>,
    out: &Buffer<f32>,
) -> Result<()> {
    LatentAttention {
        shape: LatentShape { heads: mla.heads, latent: mla.kv_rank, rope: mla.rope_dim, scale: mla.scale },
        places: workspace.places(inputs),
        queries: queries.all(),
        cache,
        kind,
        workspace: Some(workspace.attention.all()),
        out: out.all(),
    }
    .launch(device)
}

pub fn attention(
    device: &Device,
    workspace: &Workspace,
    (gqa, sinks): (&Gqa, Option<&Buffer<f32>>),
    inputs: &Inputs,
    (kind, keys, values): (CacheType, Slice<'_, u8>, Slice<'_, u8>),
    queries: &Buffer<f32>,
    out: &Buffer<f32>,
) -> Result<()> {
    GroupedAttention {
        heads: gqa.heads,
        kv_heads: gqa.kv_heads,
        head_dim: gqa.head_dim,
        value_dim: gqa.head_dim,
        scale: gqa.scale,
        window: gqa.window,
        sinks: sinks.map(Buffer::all),
        places: workspace.places(inputs),
        prompt: false,
        queries: queries.all(),
        keys,
        values,
        kind,
        workspace: Some(workspace.attention.all()),
        out: out.all(),
    }
    .launch(device)
}
