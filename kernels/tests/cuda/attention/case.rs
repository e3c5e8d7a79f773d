//! Sequences in paged caches, queries at places of them, and what should come out.

use half::bf16;
use kernels::attention::{
    CacheMut, CacheSlice, CacheType, Gqa, Mla, PAGE, Pages, Queries, RowShape, write_rows,
};
use kernels::cuda::{Device, GroupedAttention, LatentAttention, Places};
use kernels::{Rows, reference};

use crate::common::Random;

/// Two rounded weights, above and below the line, times the greatest value.
const WEIGHTS: f64 = 1.0 / 256.0;
/// Sums of f32 in another order.
const F32: f64 = 1e-5;

fn rounded(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// The cache of some sequences whose pages lie shuffled among others that are all ones, which is NaN in every type.
struct Cache {
    kind: CacheType,
    shape: RowShape,
    bytes: Vec<u8>,
    /// What kernels see of it.
    seen: Vec<f32>,
    tables: Vec<Vec<u32>>,
}

impl Cache {
    fn new(
        random: &mut Random,
        kind: CacheType,
        shape: RowShape,
        tables: &[Vec<u32>],
        lengths: &[usize],
    ) -> Self {
        let blocks = 1 + tables.iter().flatten().max().map_or(0, |&last| last as usize + 1);
        let (row, rows) = (shape.values(), blocks * PAGE);
        let mut bytes = vec![0xff; rows * kind.row_bytes(shape)];
        let mut seen = vec![f32::NAN; rows * row];
        for (table, &length) in tables.iter().zip(lengths) {
            let slots: Vec<u32> =
                (0..length).map(|p| table[p / PAGE] * PAGE as u32 + (p % PAGE) as u32).collect();
            let x: Vec<f32> = (0..length * row).map(|_| 2.0 * random.value()).collect();
            write(kind, shape, &mut bytes, &slots, &x);
            let pages = pages_of(kind, shape, &bytes, table);
            for (position, slot) in slots.iter().enumerate() {
                let mut values = reference::cached_row(&pages.pages(), position);
                if kind == CacheType::Fp8 {
                    values.iter_mut().for_each(|v| *v = rounded(*v));
                }
                seen[*slot as usize * row..][..row].copy_from_slice(&values);
            }
        }
        Self { kind, shape, bytes, seen, tables: tables.to_vec() }
    }

    fn pages(&self, sequence: usize) -> Pages<'_> {
        Pages { data: CacheSlice::F32(&self.seen), row: self.shape.values(), table: &self.tables[sequence] }
    }

    fn greatest(&self) -> f64 {
        self.seen.iter().filter(|x| !x.is_nan()).fold(0.0, |most, x| most.max(f64::from(x.abs())))
    }
}

/// Rows of a cache in the type that the host's functions want.
struct HostPages<'a> {
    f32: Vec<f32>,
    bf16: Vec<u16>,
    fp8: &'a [u8],
    kind: CacheType,
    shape: RowShape,
    table: &'a [u32],
}

fn pages_of<'a>(kind: CacheType, shape: RowShape, bytes: &'a [u8], table: &'a [u32]) -> HostPages<'a> {
    let (mut f32, mut bf16) = (vec![], vec![]);
    match kind {
        CacheType::F32 => f32 = bytes.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect(),
        CacheType::Bf16 => bf16 = bytes.as_chunks().0.iter().map(|two| u16::from_le_bytes(*two)).collect(),
        CacheType::Fp8 => {}
    }
    HostPages { f32, bf16, fp8: bytes, kind, shape, table }
}

impl HostPages<'_> {
    fn pages(&self) -> Pages<'_> {
        let data = match self.kind {
            CacheType::F32 => CacheSlice::F32(&self.f32),
            CacheType::Bf16 => CacheSlice::Bf16(&self.bf16),
            CacheType::Fp8 => CacheSlice::Fp8 { data: self.fp8, shape: self.shape },
        };
        Pages { data, row: self.shape.values(), table: self.table }
    }
}

fn write(kind: CacheType, shape: RowShape, bytes: &mut [u8], slots: &[u32], x: &[f32]) {
    let (row, rows) = (shape.values(), bytes.len() / kind.row_bytes(shape));
    let x = Rows::new(x, row);
    match kind {
        CacheType::Fp8 => write_rows(CacheMut::Fp8 { data: bytes, shape }, row, slots, x),
        CacheType::Bf16 => {
            let mut data = vec![u16::MAX; rows * row];
            write_rows(CacheMut::Bf16(&mut data), row, slots, x);
            keep_written(
                bytes,
                &data.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>(),
                slots,
                2 * row,
            );
        }
        CacheType::F32 => {
            let mut data = vec![f32::NAN; rows * row];
            write_rows(CacheMut::F32(&mut data), row, slots, x);
            keep_written(
                bytes,
                &data.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>(),
                slots,
                4 * row,
            );
        }
    }
}

fn keep_written(bytes: &mut [u8], written: &[u8], slots: &[u32], row_bytes: usize) {
    for &slot in slots {
        let at = slot as usize * row_bytes;
        bytes[at..][..row_bytes].copy_from_slice(&written[at..][..row_bytes]);
    }
}

/// Pages for sequences of some lengths: no two the same, in no order.
fn shuffled_tables(random: &mut Random, lengths: &[usize]) -> Vec<Vec<u32>> {
    let pages: usize = lengths.iter().map(|length| length.div_ceil(PAGE)).sum();
    let mut blocks: Vec<u32> = (0..pages as u32 + 2).collect();
    for i in (1..blocks.len()).rev() {
        blocks.swap(i, random.below(i + 1));
    }
    let mut next = blocks.into_iter();
    lengths.iter().map(|length| next.by_ref().take(length.div_ceil(PAGE)).collect()).collect()
}

/// A row of a launch: its sequence and position; padding below zero.
pub type Place = (usize, i32);

/// Either kind of attention.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    Latent { heads: usize, latent: usize, rope: usize },
    Grouped { heads: usize, kv_heads: usize, key: usize, value: usize, window: Option<usize>, sinks: bool },
}

impl Shape {
    pub fn window(self) -> Option<usize> {
        match self {
            Self::Latent { .. } => None,
            Self::Grouped { window, .. } => window,
        }
    }

    /// Values of a row of queries, and of the output.
    pub fn widths(self) -> (usize, usize) {
        match self {
            Self::Latent { heads, latent, rope } => (heads * (latent + rope), heads * latent),
            Self::Grouped { heads, key, value, .. } => (heads * key, heads * value),
        }
    }
}

const SCALE: f32 = 0.21;

/// Some sequences, queries at places of them, and what should come out.
pub struct Case {
    shape: Shape,
    keys: Cache,
    values: Option<Cache>,
    places: Vec<Place>,
    queries: Vec<f32>,
    sinks: Vec<f32>,
}

impl Case {
    pub fn new(
        random: &mut Random,
        shape: Shape,
        kind: CacheType,
        lengths: &[usize],
        places: &[Place],
    ) -> Self {
        let tables = shuffled_tables(random, lengths);
        let mut cache = |heads, width, plain| {
            Cache::new(random, kind, RowShape { heads, width, plain }, &tables, lengths)
        };
        let (keys, values, heads) = match shape {
            Shape::Latent { heads, latent, rope } => (cache(1, latent, rope), None, heads),
            Shape::Grouped { heads, kv_heads, key, value, .. } => {
                (cache(kv_heads, key, 0), Some(cache(kv_heads, value, 0)), heads)
            }
        };
        let queries = (0..places.len() * shape.widths().0).map(|_| 2.0 * random.value()).collect();
        let sinks = random.values(heads);
        Self { shape, keys, values, places: places.to_vec(), queries, sinks }
    }

    /// The same with some of the rows.
    pub fn rows(&self, from: usize, to: usize) -> (Vec<Place>, Vec<f32>) {
        let width = self.shape.widths().0;
        (self.places[from..to].to_vec(), self.queries[from * width..to * width].to_vec())
    }

    /// What `want` says against what came out: the greatest difference relative to the greatest value.
    pub fn check(&self, out: &[f32], what: &str) {
        let exact = self.keys.kind == CacheType::F32;
        let greatest = self.values.as_ref().unwrap_or(&self.keys).greatest();
        let tolerance = greatest * if exact { F32 } else { WEIGHTS };
        let (width, value) = self.shape.widths();
        for (row, &(sequence, position)) in self.places.iter().enumerate() {
            let out = &out[row * value..][..value];
            if position < 0 {
                assert!(out.iter().all(|x| x.is_nan()), "{what}: padding was written");
                continue;
            }
            let query: Vec<f32> = self.queries[row * width..][..width]
                .iter()
                .map(|&x| if exact { x } else { rounded(x) })
                .collect();
            let queries = Queries { rows: &query, first_position: position as usize };
            let keys = self.keys.pages(sequence);
            let want = match self.shape {
                Shape::Latent { heads, latent, rope } => {
                    reference::mla(&Mla { heads, latent, rope, scale: SCALE }, queries, &keys)
                }
                Shape::Grouped { heads, kv_heads, key, value, window, sinks } => {
                    let sinks = sinks.then_some(&self.sinks[..]);
                    let shape =
                        Gqa { heads, kv_heads, head_dim: key, value_dim: value, scale: SCALE, window, sinks };
                    let values = self.values.as_ref().expect("of grouped attention").pages(sequence);
                    reference::gqa(&shape, queries, &keys, &values)
                }
            };
            for (column, (&got, want)) in out.iter().zip(want).enumerate() {
                let wrong = (f64::from(got) - want).abs();
                assert!(wrong <= tolerance, "{what}: {got}, not {want}, at row {row}, column {column}");
            }
        }
    }

    /// All rows in one launch.
    pub fn run(&self, device: &Device, form: Form) -> Vec<f32> {
        self.run_rows(device, &self.places, &self.queries, form)
    }

    pub fn run_rows(&self, device: &Device, places: &[Place], queries: &[f32], form: Form) -> Vec<f32> {
        let pages = self.keys.tables.iter().map(Vec::len).max().unwrap().max(1);
        // Past the pages of a sequence, pages that are not there.
        let row = |table: &Vec<u32>| {
            (0..pages).map(|page| table.get(page).map_or(i32::MAX, |&block| block as i32)).collect::<Vec<_>>()
        };
        let tables: Vec<i32> = self.keys.tables.iter().flat_map(row).collect();
        let tables = device.upload(&tables).unwrap();
        let positions = device.upload(&places.iter().map(|place| place.1).collect::<Vec<_>>()).unwrap();
        let sequences =
            device.upload(&places.iter().map(|place| place.0 as i32).collect::<Vec<_>>()).unwrap();
        let context = places.iter().map(|place| place.1 + 1).max().unwrap().max(0) as usize;
        let places_there = Places {
            positions: positions.all(),
            sequences: sequences.all(),
            tables: tables.all(),
            pages,
            context,
        };
        let queries = device.upload(queries).unwrap();
        let keys = device.upload(&self.keys.bytes).unwrap();
        let out = device.upload(&vec![f32::NAN; places.len() * self.shape.widths().1]).unwrap();
        let workspace = |len: usize| form.split.then(|| device.upload(&vec![f32::NAN; len.max(1)]).unwrap());
        let rows = places.len();
        match self.shape {
            Shape::Latent { heads, latent, rope } => {
                let shape = Mla { heads, latent, rope, scale: SCALE };
                let workspace = workspace(LatentAttention::workspace_len(&shape, rows, context));
                let attention = LatentAttention {
                    shape,
                    places: places_there,
                    queries: queries.all(),
                    cache: keys.all(),
                    kind: self.keys.kind,
                    workspace: workspace.as_ref().map(|workspace| workspace.all()),
                    out: out.all(),
                };
                attention.launch(device).unwrap();
            }
            Shape::Grouped { heads, kv_heads, key, value, window, sinks } => {
                let values = device.upload(&self.values.as_ref().expect("values").bytes).unwrap();
                let sink_values = device.upload(&self.sinks).unwrap();
                let mut attention = GroupedAttention {
                    heads,
                    kv_heads,
                    head_dim: key,
                    value_dim: value,
                    scale: SCALE,
                    window,
                    sinks: sinks.then_some(sink_values.all()),
                    places: places_there,
                    prompt: form.prompt,
                    queries: queries.all(),
                    keys: keys.all(),
                    values: values.all(),
                    kind: self.keys.kind,
                    workspace: None,
                    out: out.all(),
                };
                let workspace = workspace(attention.workspace_len(rows, context));
                attention.workspace = workspace.as_ref().map(|workspace| workspace.all());
                attention.launch(device).unwrap();
            }
        }
        out.read().unwrap()
    }
}

/// How a launch is done, of which nothing may be seen.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    split: bool,
    prompt: bool,
}

pub const FORMS: [Form; 4] = [
    Form { split: false, prompt: true },
    Form { split: true, prompt: true },
    Form { split: true, prompt: false },
    Form { split: false, prompt: false },
];

/// Of latents the last two are the first two again.
pub fn forms(shape: Shape) -> &'static [Form] {
    if matches!(shape, Shape::Latent { .. }) { &FORMS[..2] } else { &FORMS }
}

impl Case {
    /// Puts a bf16 code into the first head's key and value at a position.
    pub fn spoil(&mut self, sequence: usize, position: usize, code: u16) {
        for cache in [Some(&mut self.keys), self.values.as_mut()].into_iter().flatten() {
            assert!(cache.kind == CacheType::Bf16);
            let slot = cache.tables[sequence][position / PAGE] as usize * PAGE + position % PAGE;
            let at = 2 * (slot * cache.shape.values() + 5);
            cache.bytes[at..at + 2].copy_from_slice(&code.to_le_bytes());
        }
    }
}
