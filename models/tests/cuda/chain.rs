//! A whole model's step as launches on the device: what the `cuda` runner will do, for as many rows as it is made
//! for. Everything that changes from step to step is read from device memory, so one captured graph serves all.

use half::bf16;
use kernels::attention::{CacheType, PAGE};
use kernels::cuda::{
    Buffer, CacheWrite, Device, DeviceError, Embed, EmbeddingTable, ExpertsDown, ExpertsUp, Finalize, Gather,
    Group, GroupedPairs, HeadNorm, Heads, Multiply, Order, Planes, RmsNorm, Rotate, Route, Split, Strided,
    Tiles, UNIT_LEN, Units, WriteRows, max_units, rotation_table,
};
use models::Model;
use models::config::{Ffn, Gqa, LayerSpec, Mixer, Mla, Moe, QkNorm, Rope};

use crate::ops;
use crate::weights::{DeviceFfn, DeviceLayer, DeviceMixer, DeviceMlp, DeviceModel, DeviceMoe};
use crate::widths::Widths;

type Result<T> = std::result::Result<T, DeviceError>;

/// What a step is told: one entry per row; rows past the tokens have position and slot -1.
pub struct Inputs {
    pub ids: Buffer<i32>,
    pub positions: Buffer<i32>,
    pub slots: Buffer<i32>,
    /// Which table a row uses.
    pub sequences: Buffer<i32>,
    /// `[sequences, blocks]`.
    pub tables: Buffer<i32>,
    /// `[1]`: rows that are tokens.
    pub tokens: Buffer<u32>,
}

/// The cache of a layer: keys and values, or latents.
struct Cache {
    stores: Vec<Buffer<u8>>,
}

/// Memory for what a layer computes, as wide as the widest needs.
struct Scratch {
    stream: Buffer<f32>,
    normed: Buffer<bf16>,
    nibble: Buffer<bf16>,
    /// Planes of whatever a product takes next.
    planes: Buffer<bf16>,
    low: Buffer<f32>,
    projected: Buffer<f32>,
    key: Buffer<f32>,
    value: Buffer<f32>,
    query: Buffer<f32>,
    mixed: Buffer<f32>,
    heads: Buffer<f32>,
    router: Buffer<f32>,
    ids: Buffer<i32>,
    weights: Buffer<f32>,
    order: Buffer<i32>,
    offsets: Buffer<i32>,
    units: Buffer<u32>,
    unit_counts: Buffer<u32>,
    inner: Buffer<bf16>,
    expert_out: Buffer<f32>,
    shared: Buffer<f32>,
    workspace: ops::Workspace,
}

pub struct Chain<'m> {
    model: &'m Model,
    weights: DeviceModel,
    caches: Vec<Cache>,
    tables: Vec<Option<Buffer<f32>>>,
    scratch: Scratch,
    pub inputs: Inputs,
    pub logits: Buffer<f32>,
    /// The residual stream after each layer.
    pub outs: Vec<Buffer<f32>>,
    rows: usize,
    planes: usize,
    cache_type: CacheType,
    blocks: usize,
}

impl<'m> Chain<'m> {
    /// For steps of `rows` rows of sequences that share `blocks` blocks of cache.
    pub fn new(
        device: &Device,
        model: &'m Model,
        (planes, cache_type): (usize, CacheType),
        (rows, blocks): (usize, usize),
    ) -> Result<Self> {
        let config = &model.config;
        let cache = |layer: &LayerSpec| {
            let store = |shape| {
                // What nobody has written must not be read: as NaN it would show.
                device.upload(&vec![0xffu8; blocks * PAGE * cache_type.row_bytes(shape)])
            };
            let stores = layer.cache_rows().shapes().iter().map(|shape| store(*shape)).collect::<Result<_>>();
            stores.map(|stores| Cache { stores })
        };
        let table = |layer: &LayerSpec| {
            let rope = rope(layer)?;
            Some(device.upload(&rotation_table(&rope.inv_freq, rope.attention_scale, blocks * PAGE)))
        };
        let f32s = |values: usize| device.alloc::<f32>(rows * values);
        let planar = |values: usize| device.alloc::<bf16>(3 * rows * values);
        let widths = Widths::of(model);
        let pairs = rows * widths.top_k;
        Ok(Self {
            weights: DeviceModel::upload(device, model)?,
            caches: config.layers.iter().map(cache).collect::<Result<_>>()?,
            tables: config.layers.iter().map(|layer| table(layer).transpose()).collect::<Result<_>>()?,
            scratch: Scratch {
                stream: f32s(config.hidden)?,
                normed: planar(config.hidden)?,
                nibble: planar(config.hidden)?,
                planes: planar(widths.planes)?,
                low: f32s(widths.low)?,
                projected: f32s(widths.query)?,
                key: f32s(widths.key)?,
                value: f32s(widths.key)?,
                query: f32s(widths.query)?,
                mixed: f32s(widths.query)?,
                heads: f32s(widths.query)?,
                router: f32s(widths.experts)?,
                ids: device.alloc(pairs)?,
                weights: device.alloc(pairs)?,
                order: device.alloc(pairs)?,
                offsets: device.alloc(widths.experts + 1)?,
                units: device.alloc(UNIT_LEN * max_units(pairs, widths.experts, 1))?,
                unit_counts: device.alloc(2)?,
                inner: device.alloc(3 * pairs * widths.inter)?,
                expert_out: device.alloc(pairs * config.hidden)?,
                shared: f32s(config.hidden)?,
                workspace: ops::Workspace::new(device, blocks)?,
            },
            inputs: Inputs {
                ids: device.zeroed(rows)?,
                positions: device.zeroed(rows)?,
                slots: device.zeroed(rows)?,
                sequences: device.zeroed(rows)?,
                tables: device.zeroed(rows * blocks)?,
                tokens: device.zeroed(1)?,
            },
            logits: f32s(config.vocab)?,
            outs: config.layers.iter().map(|_| f32s(config.hidden)).collect::<Result<_>>()?,
            model,
            rows,
            planes,
            cache_type,
            blocks,
        })
    }

    /// Says what the next step computes: `(id, position, sequence)` of each token. Sequence s has the blocks
    /// `tables[s]`.
    pub fn set(&self, tokens: &[(u32, usize, usize)], tables: &[Vec<u32>]) -> Result<()> {
        let inputs = &self.inputs;
        let padded = |f: &dyn Fn(&(u32, usize, usize)) -> i32, rest: i32| {
            let mut values: Vec<i32> = tokens.iter().map(f).collect();
            assert!(values.len() <= self.rows, "{} tokens in {} rows", values.len(), self.rows);
            values.resize(self.rows, rest);
            values
        };
        inputs.ids.write(&padded(&|t| t.0 as i32, 0))?;
        inputs.positions.write(&padded(&|t| t.1 as i32, -1))?;
        inputs
            .slots
            .write(&padded(&|t| (tables[t.2][t.1 / PAGE] as usize * PAGE + t.1 % PAGE) as i32, -1))?;
        inputs.sequences.write(&padded(&|t| t.2 as i32, 0))?;
        let mut flat = vec![0; self.rows * self.blocks];
        for (table, flat) in tables.iter().zip(flat.chunks_mut(self.blocks)) {
            flat.iter_mut().zip(table).for_each(|(flat, block)| *flat = *block as i32);
        }
        inputs.tables.write(&flat)?;
        inputs.tokens.write(&[tokens.len() as u32])
    }

    /// Overwrites the residual stream, for a step that begins in the middle.
    pub fn set_stream(&self, values: &[f32]) -> Result<()> {
        self.scratch.stream.slice(..values.len()).write(values)
    }

    /// The first values of the residual stream.
    pub fn stream(&self, values: usize) -> Result<Vec<f32>> {
        self.scratch.stream.slice(..values).read()
    }

    /// Logits of a row.
    pub fn vocab(&self) -> usize {
        self.model.config.vocab
    }

    /// From token ids to logits of every row.
    pub fn step(&self, device: &Device) -> Result<()> {
        let hidden = self.model.config.hidden;
        let table = self.weights.embedding.codes.all().cast::<bf16>();
        let (ids, out) = (self.inputs.ids.all(), self.scratch.stream.all());
        Embed { table: EmbeddingTable::Bf16(table), ids, hidden, out }.launch(device)?;
        for layer in 0..self.model.config.layers.len() {
            self.layer(device, layer)?;
            self.outs[layer].copy_from(&self.scratch.stream)?;
        }
        let normed = self.norm(device, &self.weights.final_norm, false)?;
        let logits = Strided::new(&self.logits, self.model.config.vocab);
        ops::dense(device, &self.scratch.workspace, normed, self.rows, &self.weights.head, logits, false)
    }

    /// One layer, from the residual stream to the residual stream.
    pub fn layer(&self, device: &Device, index: usize) -> Result<()> {
        let (spec, weights) = (&self.model.config.layers[index], &self.weights.layers[index]);
        let x = self.norm(device, &weights.input_norm, false)?;
        match (&spec.mixer, &weights.mixer) {
            (Mixer::Mla(mla), mixer @ DeviceMixer::Mla { .. }) => self.mla(device, index, mla, mixer, x)?,
            (Mixer::Gqa(gqa), mixer @ DeviceMixer::Gqa { .. }) => self.gqa(device, index, gqa, mixer, x)?,
            _ => unreachable!("weights of the same description"),
        }
        match (&spec.ffn, &weights.ffn) {
            (Ffn::Dense(mlp), DeviceFfn::Dense(weights)) => {
                let x = self.norm(device, self.post_norm(index), false)?;
                let stream = Strided::new(&self.scratch.stream, self.model.config.hidden);
                self.mlp(device, (mlp.activation, weights), x, stream, true)
            }
            (Ffn::Moe(moe), DeviceFfn::Moe(weights)) => self.moe(device, index, moe, weights),
            _ => unreachable!("weights of the same description"),
        }
    }

    fn post_norm(&self, index: usize) -> &Buffer<f32> {
        let DeviceLayer { post_norm, .. } = &self.weights.layers[index];
        post_norm
    }

    /// The normed stream as three planes, of which products in `model` numerics take the first.
    fn norm(&self, device: &Device, weight: &Buffer<f32>, nibble: bool) -> Result<Planes<'_>> {
        let hidden = self.model.config.hidden;
        let natural = Planes::new(&self.scratch.normed, 3);
        RmsNorm {
            x: Strided::new(&self.scratch.stream, hidden),
            delta: None,
            weight: Some(weight.all()),
            eps: self.model.config.norm_epsilon,
            rows: self.rows,
            width: hidden,
            out: None,
            natural: Some(natural),
            nibble: nibble.then(|| Planes::new(&self.scratch.nibble, 3)),
        }
        .launch(device)?;
        Ok(Planes { count: self.planes, ..natural })
    }

    /// f32 rows as planes in natural order.
    fn split(&self, device: &Device, x: Strided<'_>, rows: usize, width: usize) -> Result<Planes<'_>> {
        let stride = self.scratch.planes.len() / 3;
        let planes = Planes { values: self.scratch.planes.all(), count: self.planes, stride };
        Split { x, rows, width, natural: Some(planes), nibble: None }.launch(device)?;
        Ok(planes)
    }

    fn mla(
        &self,
        device: &Device,
        index: usize,
        mla: &Mla,
        weights: &DeviceMixer,
        x: Planes<'_>,
    ) -> Result<()> {
        let DeviceMixer::Mla { a, q, kv_a, kv_norm, kv_b, o } = weights else { unreachable!() };
        let Scratch { low, projected, key, query, mixed, heads, stream, workspace, .. } = &self.scratch;
        let (rows, head_width, row) = (self.rows, mla.nope_dim + mla.rope_dim, mla.kv_rank + mla.rope_dim);
        let latent_norm = |x: Strided<'_>, weight: &Buffer<f32>, width: usize| {
            let (weight, eps) = (Some(weight.all()), mla.latent_epsilon);
            RmsNorm { x, delta: None, weight, eps, rows, width, out: Some(x), natural: None, nibble: None }
                .launch(device)
        };
        let wide = Strided::new(projected, mla.heads * head_width);
        match a {
            Some((a, norm)) => {
                let low = Strided::new(low, a.rows);
                ops::dense(device, workspace, x, rows, a, low, false)?;
                latent_norm(low, norm, a.rows)?;
                let x_low = self.split(device, low, rows, a.rows)?;
                ops::dense(device, workspace, x_low, rows, q, wide, false)?;
            }
            None => ops::dense(device, workspace, x, rows, q, wide, false)?,
        }
        let latents = Strided::new(key, row);
        ops::dense(device, workspace, x, rows, kv_a, latents, false)?;
        latent_norm(latents, kv_norm, mla.kv_rank)?;
        let queries = Heads { x: wide, count: mla.heads, stride: head_width, offset: mla.nope_dim };
        let keys = Heads { x: latents, count: 1, stride: row, offset: mla.kv_rank };
        self.rotate(device, index, mla.rope.as_ref(), queries, keys)?;
        self.write(device, index, &[latents])?;

        // Absorbed queries: per head [q_nope W_UK | rotated q_rope].
        let all_heads = rows * mla.heads;
        let nope = self.split(device, Strided::new(projected, head_width), all_heads, mla.nope_dim)?;
        ops::absorb(device, workspace, nope, rows, mla, kv_b, Strided::new(query, row))?;
        let from = Strided::new(projected.slice(mla.nope_dim..), head_width);
        let to = Strided::new(query.slice(mla.kv_rank..), row);
        let width = mla.rope_dim;
        Gather { from, from_rows: all_heads, index: None, to, rows: all_heads, width }.launch(device)?;
        let cache = self.caches[index].stores[0].all();
        ops::latent_attention(device, workspace, mla, &self.inputs, (self.cache_type, cache), query, mixed)?;
        let latent = self.split(device, Strided::new(mixed, mla.kv_rank), all_heads, mla.kv_rank)?;
        ops::expand(device, workspace, latent, rows, mla, kv_b, Strided::new(heads, mla.value_dim))?;
        let width = mla.heads * mla.value_dim;
        let values = self.split(device, Strided::new(heads, width), rows, width)?;
        ops::dense(device, workspace, values, rows, o, Strided::new(stream, self.model.config.hidden), true)
    }

    fn gqa(
        &self,
        device: &Device,
        index: usize,
        gqa: &Gqa,
        weights: &DeviceMixer,
        x: Planes<'_>,
    ) -> Result<()> {
        let DeviceMixer::Gqa { q, k, v, o, q_norm, k_norm, sinks } = weights else { unreachable!() };
        let Scratch { query, key, value, mixed, stream, workspace, .. } = &self.scratch;
        let (rows, dim) = (self.rows, gqa.head_dim);
        let (q_width, kv_width) = (gqa.heads * dim, gqa.kv_heads * dim);
        let (queries, keys, values) =
            (Strided::new(query, q_width), Strided::new(key, kv_width), Strided::new(value, kv_width));
        for (weight, out) in [(q, queries), (k, keys), (v, values)] {
            ops::dense(device, workspace, x, rows, weight, out, false)?;
        }
        let norm = |per_head: bool| {
            for (x, width, weight) in [(queries, q_width, q_norm), (keys, kv_width, k_norm)] {
                let (heads, width) = if per_head { (width / dim, dim) } else { (1, width) };
                let (weight, eps) = (weight.as_ref().map(Buffer::all), self.model.config.norm_epsilon);
                HeadNorm { x, rows, heads, head_stride: width, width, weight, eps }.launch(device)?;
            }
            Ok(())
        };
        match gqa.qk_norm {
            QkNorm::PerHead { .. } => norm(true)?,
            QkNorm::Whole { .. } => norm(false)?,
            QkNorm::None | QkNorm::PerHeadAfterRope { .. } => {}
        }
        let heads = |x, count| Heads { x, count, stride: dim, offset: 0 };
        let (rotated, rotated_keys) = (heads(queries, gqa.heads), heads(keys, gqa.kv_heads));
        self.rotate(device, index, gqa.rope.as_ref(), rotated, rotated_keys)?;
        if let QkNorm::PerHeadAfterRope { .. } = gqa.qk_norm {
            norm(true)?;
        }
        self.write(device, index, &[keys, values])?;
        let [keys, values] = &self.caches[index].stores[..] else { unreachable!("keys and values") };
        let caches = (self.cache_type, keys.all(), values.all());
        ops::attention(device, workspace, (gqa, sinks.as_ref()), &self.inputs, caches, query, mixed)?;
        let mixed = self.split(device, Strided::new(mixed, q_width), rows, q_width)?;
        ops::dense(device, workspace, mixed, rows, o, Strided::new(stream, self.model.config.hidden), true)
    }

    fn rotate(
        &self,
        device: &Device,
        index: usize,
        rope: Option<&Rope>,
        queries: Heads<'_>,
        keys: Heads<'_>,
    ) -> Result<()> {
        let (Some(rope), Some(table)) = (rope, &self.tables[index]) else { return Ok(()) };
        Rotate {
            table: table.all(),
            positions: self.inputs.positions.all(),
            dim: rope.dim,
            rotation: rope.rotation,
            queries: Some(queries),
            keys: Some(keys),
        }
        .launch(device)
    }

    /// The new rows of a layer's caches.
    fn write(&self, device: &Device, index: usize, rows: &[Strided<'_>]) -> Result<()> {
        let stores = &self.caches[index].stores;
        let write = |i: usize| rows.get(i).map(|x| CacheWrite { x: *x, cache: stores[i].all() });
        let shape = self.model.config.layers[index].cache_rows().shapes()[0];
        let (rows, other_rows) = (write(0).expect("rows"), write(1));
        WriteRows { slots: self.inputs.slots.all(), kind: self.cache_type, shape, rows, other_rows }
            .launch(device)
    }

    fn mlp(
        &self,
        device: &Device,
        (activation, weights): (kernels::experts::Activation, &DeviceMlp),
        x: Planes<'_>,
        out: Strided<'_>,
        add: bool,
    ) -> Result<()> {
        let Scratch { planes, workspace, .. } = &self.scratch;
        let inner = Planes { values: planes.all(), count: self.planes, stride: planes.len() / 3 };
        ops::pair(device, workspace, x, self.rows, weights, activation, inner)?;
        ops::dense(device, workspace, inner, self.rows, &weights.down, out, add)
    }

    fn moe(&self, device: &Device, index: usize, moe: &Moe, weights: &DeviceMoe) -> Result<()> {
        let Scratch { stream, router, shared, workspace, .. } = &self.scratch;
        let Scratch { ids, weights: chosen, order, offsets, units, unit_counts, inner, expert_out, .. } =
            &self.scratch;
        let (rows, hidden) = (self.rows, self.model.config.hidden);
        let (top_k, experts) = (moe.rule.top_k, moe.rule.experts);
        let input_order = weights.format.order();
        let x = self.norm(device, self.post_norm(index), input_order == Order::Nibble)?;
        // Small differences of logits decide: always in full precision.
        let exact = Planes { count: 3, ..x };
        ops::dense(device, workspace, exact, rows, &weights.router, Strided::new(router, experts), false)?;
        let tokens = Some(self.inputs.tokens.all());
        let bias = weights.selection_bias.as_ref().map(Buffer::all);
        let (ids, chosen) = (ids.all(), chosen.all());
        Route { rule: moe.rule, logits: router.all(), bias, tokens: rows, ids, weights: chosen }
            .launch(device)?;
        let tiles = Tiles::Few;
        Group {
            ids,
            tokens,
            rows,
            top_k,
            experts,
            order: order.all(),
            offsets: offsets.all(),
            units: [Some(Units { size: tiles.unit_size(self.planes), list: units.all() }), None],
            unit_counts: unit_counts.all(),
            scratch: units.slice(..0),
            ring: None,
        }
        .launch(device)?;
        let shared_out = match (&moe.shared, &weights.shared) {
            (Some(mlp), Some(weights)) => {
                self.mlp(device, (mlp.activation, weights), x, Strided::new(shared, hidden), false)?;
                Some(shared.all())
            }
            _ => None,
        };
        let pairs = GroupedPairs {
            experts: weights.table.all(),
            order: order.all(),
            units: units.all(),
            unit_count: unit_counts.slice(..1),
            format: weights.format,
            tiles,
            multiply: Multiply::Mma,
            hidden,
            inter: moe.intermediate,
        };
        let x = match input_order {
            Order::Natural => x,
            Order::Nibble => Planes { count: self.planes, ..Planes::new(&self.scratch.nibble, 3) },
        };
        let inner = Planes { values: inner.all(), count: self.planes, stride: inner.len() / 3 };
        ExpertsUp {
            pairs,
            x,
            tokens: rows,
            top_k,
            inner,
            inner_order: input_order,
            activation: moe.activation,
            interleaved: weights.interleaved,
        }
        .launch(device)?;
        ExpertsDown { pairs, inner, count: rows * top_k, out: expert_out.all() }.launch(device)?;
        Finalize {
            x: stream.all(),
            add: true,
            shared: shared_out,
            out: expert_out.all(),
            weights: chosen,
            tokens,
            rows,
            top_k,
            hidden,
        }
        .launch(device)
    }
}

fn rope(layer: &LayerSpec) -> Option<&Rope> {
    match &layer.mixer {
        Mixer::Mla(mla) => mla.rope.as_ref(),
        Mixer::Gqa(gqa) => gqa.rope.as_ref(),
    }
}
