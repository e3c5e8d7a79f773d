//! The operations of a decode layer with the buffers between them.

use half::bf16;
use kernels::attention::{CacheType, Mla};
use kernels::cuda::{
    Buffer, CacheWrite, Dense, DenseHeads, DenseInput, DenseLayout, DenseShape, DenseWorkspace,
    DenseWorkspaceSize, Device, DeviceError, Finalize, Gather, Heads, LatentAttention, Planes, RmsNorm,
    Rotate, Slice, Split, Strided, WriteRows, check, rotation_table,
};
use kernels::rope::Rotation;

use super::super::dense::{Operands, shape_of, weight};
use super::super::experts::{How, Layer as Experts, Routed, Rows};
use super::super::latent::{Cache, row_shape};
use super::super::sizes::{LatentShape, MoeShape, Timed};

/// The operations, in order.
pub(super) const STEPS: [&str; 24] = [
    "input_norm",
    "q_and_kv_a",
    "q_norm",
    "kv_norm",
    "q_b",
    "rotate",
    "cache_write",
    "split_q",
    "absorb_q",
    "gather_rope",
    "attention",
    "split_latents",
    "absorb_v",
    "split_values",
    "o",
    "post_norm",
    "router",
    "route",
    "group",
    "up",
    "down",
    "shared_pair",
    "shared_down",
    "finalize",
];

/// Rows of values and the planes of the same.
struct Both {
    values: Buffer<f32>,
    planes: Buffer<bf16>,
}

impl Both {
    fn new(device: &Device, len: usize) -> Result<Self, DeviceError> {
        Ok(Self { values: device.zeroed(len)?, planes: device.zeroed(len)? })
    }

    fn input(&self, width: usize) -> DenseInput<'_> {
        DenseInput::new(Planes::new(&self.planes, 1), width)
    }
}

/// Weights, cache and activations of a layer.
pub(super) struct Layer {
    pub moe: MoeShape,
    pub routed: Routed,
    latent: LatentShape,
    mla: Mla,
    tokens: usize,
    context: usize,
    experts: Experts,
    rows: Rows,
    /// The shared expert, whose x are the planes after the second norm.
    shared: Operands,
    /// All other dense weights, one after the other.
    weights: Buffer<bf16>,
    workspace: DenseWorkspace,
    cache: Cache,
    attention: Buffer<f32>,
    rotations: Buffer<f32>,
    positions: Buffer<i32>,
    sequences: Buffer<i32>,
    slots: Buffer<i32>,
    x: Buffer<f32>,
    normed: Buffer<bf16>,
    /// The queries' latents, then what is cached.
    q_kv: Both,
    q_normed: Buffer<bf16>,
    q: Both,
    absorbed: Buffer<f32>,
    latents: Both,
    values: Both,
    shared_out: Buffer<f32>,
}

/// Where the weights begin.
struct Places {
    q_kv: usize,
    q_b: usize,
    kv_b: usize,
    o: usize,
    router: usize,
    end: usize,
}

impl Places {
    fn new(latent: &LatentShape, moe: &MoeShape) -> Self {
        let LatentShape { heads, nope, rope, value, query_rank, .. } = *latent;
        let q_b = (query_rank + latent.width()) * moe.hidden;
        let kv_b = q_b + heads * (nope + rope) * query_rank;
        let o = kv_b + heads * (nope + value) * latent.latent;
        let router = o + moe.hidden * heads * value;
        Self { q_kv: 0, q_b, kv_b, o, router, end: router + moe.experts * moe.hidden }
    }
}

impl Layer {
    pub fn new(device: &Device, timed: &Timed, moe: MoeShape, tokens: usize) -> Result<Self, DeviceError> {
        let (latent, context) = (timed.latent, timed.layer_context);
        let LatentShape { heads, nope, rope, value, query_rank, .. } = latent;
        let (hidden, mla) = (moe.hidden, latent.sharp());
        let places = Places::new(&latent, &moe);
        let weights = device.alloc(places.end)?;
        check::fill_bf16(device, weights.all(), 71, (0.0, 0.02))?;
        let multiprocessors = device.info().multiprocessors;
        let heads_of = |layout, rows, columns| DenseShape { heads, ..shape_of(layout, rows, columns) };
        let workspace = [
            shape_of(DenseLayout::Rows, query_rank + latent.width(), hidden),
            shape_of(DenseLayout::Rows, heads * (nope + rope), query_rank),
            shape_of(DenseLayout::Rows, hidden, heads * value),
            shape_of(DenseLayout::Rows, moe.experts, hidden),
            heads_of(DenseLayout::Transposed, latent.latent, nope),
            heads_of(DenseLayout::Rows, value, latent.latent),
        ];
        let workspace = workspace.iter().map(|shape| shape.workspace_size(tokens, multiprocessors));
        let workspace = workspace.fold(DenseWorkspaceSize::default(), DenseWorkspaceSize::max);
        let cache = Cache::new(device, &latent, CacheType::Bf16, &vec![context; tokens], 72)?;
        let last = context - 1;
        let slots: Vec<i32> = (0..tokens).map(|sequence| cache.slot(sequence, last) as i32).collect();
        let frequencies: Vec<f32> = (0..rope / 2).map(|i| 0.1 / (i + 1) as f32).collect();
        let x = device.alloc(tokens * hidden)?;
        check::fill_f32(device, x.all(), 73, 1.0)?;
        Ok(Self {
            moe,
            routed: Routed::new(device, &moe, tokens, 74)?,
            latent,
            mla,
            tokens,
            context,
            experts: Experts::new(device, &moe, 75)?,
            rows: Rows::new(device, &moe, tokens)?,
            shared: Operands::new(
                device,
                &[("down", hidden, moe.inter)],
                (moe.inter, hidden),
                tokens,
                3 * moe.inter * hidden,
            )?,
            weights,
            workspace: DenseWorkspace::new(device, workspace)?,
            attention: device.alloc(LatentAttention::workspace_len(&mla, tokens, context).max(1))?,
            rotations: device.upload(&rotation_table(&frequencies, 1.0, context))?,
            positions: device.upload(&vec![last as i32; tokens])?,
            sequences: device.upload(&(0..tokens as i32).collect::<Vec<i32>>())?,
            slots: device.upload(&slots)?,
            cache,
            x,
            normed: device.zeroed(tokens * hidden)?,
            q_kv: Both::new(device, tokens * (query_rank + latent.width()))?,
            q_normed: device.zeroed(tokens * query_rank)?,
            q: Both::new(device, tokens * heads * (nope + rope))?,
            absorbed: device.zeroed(tokens * heads * latent.width())?,
            latents: Both::new(device, tokens * heads * latent.latent)?,
            values: Both::new(device, tokens * heads * value)?,
            shared_out: device.zeroed(tokens * hidden)?,
        })
    }

    /// Values of all dense weights.
    pub fn dense_values(&self) -> usize {
        Places::new(&self.latent, &self.moe).end + 3 * self.moe.inter * self.moe.hidden
    }

    /// One of [`STEPS`].
    pub fn run(&self, device: &Device, step: &str) -> Result<(), DeviceError> {
        let (tokens, how) = (self.tokens, How::all(device)[0]);
        let of = (&self.experts, &self.routed);
        match step {
            "route" => self.routed.route(device, tokens),
            "group" => self.routed.group(device, tokens),
            "up" => self.rows.up(device, of, tokens, how),
            "down" => self.rows.down(device, of, tokens, how),
            "router" | "post_norm" | "shared_pair" | "shared_down" | "finalize" => {
                self.feed_forward(device, step)
            }
            "input_norm" | "q_and_kv_a" | "q_norm" | "kv_norm" | "q_b" => self.project(device, step),
            _ => self.attend(device, step),
        }
    }

    fn dense<'a>(
        &'a self,
        x: DenseInput<'a>,
        (at, rows, columns): (usize, usize, usize),
        out: &'a Buffer<f32>,
        add: bool,
    ) -> Dense<'a> {
        Dense {
            x,
            tokens: self.tokens,
            weight: weight(self.weights.slice(at..), rows, columns),
            bias: None,
            out: Strided::new(out, rows),
            add,
            workspace: &self.workspace,
        }
    }

    fn norm<'a>(&self, x: Slice<'a, f32>, stride: usize, width: usize) -> RmsNorm<'a> {
        let x = Strided::new(x, stride);
        let (rows, eps) = (self.tokens, 1e-6);
        RmsNorm { x, delta: None, weight: None, eps, rows, width, out: None, natural: None, nibble: None }
    }

    fn project(&self, device: &Device, step: &str) -> Result<(), DeviceError> {
        let LatentShape { heads, nope, rope, query_rank, latent, .. } = self.latent;
        let (hidden, places) = (self.moe.hidden, Places::new(&self.latent, &self.moe));
        let both = query_rank + self.latent.width();
        match step {
            "input_norm" => {
                let natural = Some(Planes::new(&self.normed, 1));
                RmsNorm { natural, ..self.norm(self.x.all(), hidden, hidden) }.launch(device)
            }
            "q_and_kv_a" => {
                let x = DenseInput::new(Planes::new(&self.normed, 1), hidden);
                self.dense(x, (places.q_kv, both, hidden), &self.q_kv.values, false).launch(device)
            }
            "q_norm" => {
                let natural = Some(Planes::new(&self.q_normed, 1));
                RmsNorm { natural, ..self.norm(self.q_kv.values.all(), both, query_rank) }.launch(device)
            }
            "kv_norm" => {
                let norm = self.norm(self.q_kv.values.slice(query_rank..), both, latent);
                RmsNorm { out: Some(norm.x), ..norm }.launch(device)
            }
            _ => {
                let x = DenseInput::new(Planes::new(&self.q_normed, 1), query_rank);
                let of = (places.q_b, heads * (nope + rope), query_rank);
                self.dense(x, of, &self.q.values, false).launch(device)
            }
        }
    }

    fn split(&self, device: &Device, of: &Both, width: usize) -> Result<(), DeviceError> {
        let (x, natural) = (Strided::new(&of.values, width), Some(Planes::new(&of.planes, 1)));
        Split { x, rows: self.tokens, width, natural, nibble: None }.launch(device)
    }

    fn attend(&self, device: &Device, step: &str) -> Result<(), DeviceError> {
        let LatentShape { heads, nope, rope, value, query_rank, latent } = self.latent;
        let (tokens, width, head) = (self.tokens, self.latent.width(), nope + rope);
        let places = Places::new(&self.latent, &self.moe);
        let both = query_rank + width;
        let cached = Strided::new(self.q_kv.values.slice(query_rank..), both);
        let kv_b = weight(self.weights.slice(places.kv_b..), heads * (nope + value), latent);
        let of_heads = |x, x_head_stride, (first_row, rows), transposed, out, out_head_stride| DenseHeads {
            x,
            x_head_stride,
            tokens,
            weight: kv_b,
            first_row,
            row_stride: nope + value,
            rows,
            heads,
            transposed,
            out: Strided::new(out, heads * out_head_stride),
            out_head_stride,
            workspace: &self.workspace,
        };
        match step {
            "rotate" => {
                let queries = Heads {
                    x: Strided::new(&self.q.values, heads * head),
                    count: heads,
                    stride: head,
                    offset: nope,
                };
                let keys = Heads { x: cached, count: 1, stride: width, offset: latent };
                Rotate {
                    table: self.rotations.all(),
                    positions: self.positions.all(),
                    dim: rope,
                    rotation: Rotation::Interleaved,
                    queries: Some(queries),
                    keys: Some(keys),
                }
                .launch(device)
            }
            "cache_write" => WriteRows {
                slots: self.slots.all(),
                kind: CacheType::Bf16,
                shape: row_shape(&self.latent),
                rows: CacheWrite { x: cached, cache: self.cache.bytes.all() },
                other_rows: None,
            }
            .launch(device),
            "split_q" => self.split(device, &self.q, heads * head),
            "absorb_q" => {
                let x = self.q.input(heads * head);
                of_heads(x, head, (0, nope), true, self.absorbed.all(), width).launch(device)
            }
            "gather_rope" => Gather {
                from: Strided::new(self.q.values.slice(nope..), head),
                from_rows: tokens * heads,
                index: None,
                to: Strided::new(self.absorbed.slice(latent..), width),
                rows: tokens * heads,
                width: rope,
            }
            .launch(device),
            "attention" => {
                let places = self.cache.places(self.positions.all(), self.sequences.all(), 0, self.context);
                let ends = (self.absorbed.all(), self.latents.values.all());
                self.cache.attention(self.mla, places, ends, &self.attention).launch(device)
            }
            "split_latents" => self.split(device, &self.latents, heads * latent),
            "absorb_v" => {
                let x = self.latents.input(heads * latent);
                of_heads(x, latent, (nope, value), false, self.values.values.all(), value).launch(device)
            }
            "split_values" => self.split(device, &self.values, heads * value),
            "o" => {
                let of = (places.o, self.moe.hidden, heads * value);
                self.dense(self.values.input(heads * value), of, &self.x, true).launch(device)
            }
            _ => unreachable!("{step} is no step of a layer"),
        }
    }

    fn feed_forward(&self, device: &Device, step: &str) -> Result<(), DeviceError> {
        let MoeShape { hidden, inter, experts, top_k } = self.moe;
        let tokens = self.tokens;
        match step {
            "post_norm" => {
                let natural = Some(Planes::new(self.shared.x.slice(..tokens * hidden), 1));
                let nibble = Some(Planes::new(&self.rows.planes, 1));
                RmsNorm { natural, nibble, ..self.norm(self.x.all(), hidden, hidden) }.launch(device)
            }
            "router" => {
                let router = Places::new(&self.latent, &self.moe).router;
                let x = self.shared.x.slice(..tokens * hidden);
                let x = DenseInput::new(Planes::new(x, 1), hidden);
                self.dense(x, (router, experts, hidden), &self.routed.logits, false).launch(device)
            }
            "shared_pair" => self.shared.pair((inter, hidden), (0, tokens), 0).launch(device),
            "shared_down" => Dense {
                x: DenseInput::new(Planes::new(&self.shared.planes, 1), inter),
                tokens,
                weight: weight(self.shared.weights.slice(2 * inter * hidden..), hidden, inter),
                bias: None,
                out: Strided::new(&self.shared_out, hidden),
                add: false,
                workspace: &self.shared.workspace,
            }
            .launch(device),
            // Written and not added: x stays as it is, turn after turn.
            _ => Finalize {
                x: self.rows.sum.all(),
                add: false,
                shared: Some(self.shared_out.all()),
                out: self.rows.out.all(),
                weights: self.routed.weights.all(),
                tokens: None,
                rows: tokens,
                top_k,
                hidden,
            }
            .launch(device),
        }
    }
}
