//! Which kernel a product takes, on what grid, and how k is cut.

use super::super::image::Kernel;
use super::DenseFormat;

/// As in `dense.cuh`: shared memory for stages, and the most stages.
const SHARED_BUDGET: usize = 100_000;
const MOST_STAGES: usize = 8;
/// Columns of a block of FP8 scales; pieces of k are multiples of it.
const SCALE_BLOCK: usize = 128;
/// Blocks that the largest devices of today hold at once, with two for each of 132 multiprocessors: k is cut into
/// pieces where rows alone make fewer.
const RESIDENT_BLOCKS: usize = 264;
/// Rows of a block that streams weights.
const ROWS: usize = 64;
/// Blocks of a wide product whose pieces lie in the workspace, at most: 64 MiB of sums.
const MOST_WIDE_PARTS: usize = 1024;

/// How the sums of a product are taken from its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DenseLayout {
    /// `out[r] = sum over c of W[r, c] x[c]`.
    Rows,
    /// The same of two weights, gate and up, which share the blocks.
    GateUp,
    /// `out[c] = sum over r of W[r, c] x[r]`.
    Transposed,
}

/// What decides the kernel of a product, and the order of its sums: everything but the number of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DenseShape {
    /// Of the weight.
    pub format: DenseFormat,
    /// How the weight is used.
    pub layout: DenseLayout,
    /// Outputs of a head and token: of a pair those of one weight.
    pub rows: usize,
    /// Terms of a sum.
    pub columns: usize,
    /// 1, unless a head has its own part of the weight.
    pub heads: usize,
    /// Planes of x: 1 or 3.
    pub planes: usize,
}

/// What products leave in memory between the blocks that share a sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DenseWorkspaceSize {
    /// f32 values.
    pub sums: usize,
    /// u32 values, all 0 between launches.
    pub counters: usize,
}

impl DenseWorkspaceSize {
    /// What suffices for either.
    pub fn max(self, other: Self) -> Self {
        Self { sums: self.sums.max(other.sums), counters: self.counters.max(other.counters) }
    }
}

/// A launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub kernel: Kernel,
    pub grid: (u32, u32, u32),
    pub threads: u32,
    pub shared_bytes: usize,
    /// Of k.
    pub piece: usize,
    pub workspace: DenseWorkspaceSize,
}

/// A kernel of `dense.cu`.
struct Variant {
    layout: DenseLayout,
    format: DenseFormat,
    planes: usize,
    /// Tokens of a block.
    tokens: usize,
    /// Of 128 rows.
    wide: bool,
    name: &'static str,
}

macro_rules! variants {
    ($($layout:ident $format:ident $planes:literal: $($tokens:literal $wide:literal $name:literal),+;)+) => {
        &[$($(Variant {
            layout: DenseLayout::$layout,
            format: DenseFormat::$format,
            planes: $planes,
            tokens: $tokens,
            wide: $wide,
            name: $name,
        }),+),+]
    };
}

/// In the order in which they are tried: the first with room for all tokens, else the last.
static VARIANTS: &[Variant] = variants! {
    Rows Bf16 1:
        8 false "dense_bf16_t8_p1", 16 false "dense_bf16_t16_p1", 32 false "dense_bf16_t32_p1",
        64 false "dense_bf16_t64_p1", 128 true "dense_bf16_wide_p1";
    Rows Bf16 3: 32 false "dense_bf16_t32_p3";
    Rows Fp8 1:
        8 false "dense_fp8_t8_p1", 16 false "dense_fp8_t16_p1", 32 false "dense_fp8_t32_p1",
        64 false "dense_fp8_t64_p1", 64 true "dense_fp8_wide_p1";
    Rows Fp8 3: 32 false "dense_fp8_t32_p3";
    Transposed Bf16 1: 16 false "dense_transposed_bf16_t16_p1", 128 true "dense_transposed_bf16_wide_p1";
    Transposed Bf16 3: 32 false "dense_transposed_bf16_t32_p3";
    Transposed Fp8 1: 16 false "dense_transposed_fp8_t16_p1", 64 true "dense_transposed_fp8_wide_p1";
    Transposed Fp8 3: 32 false "dense_transposed_fp8_t32_p3";
    GateUp Bf16 1:
        16 false "dense_pair_bf16_t16_p1", 64 false "dense_pair_bf16_t64_p1", 128 true "dense_pair_bf16_wide_p1";
    GateUp Bf16 3: 32 false "dense_pair_bf16_t32_p3";
    GateUp Fp8 1:
        16 false "dense_pair_fp8_t16_p1", 64 false "dense_pair_fp8_t64_p1", 64 true "dense_pair_fp8_wide_p1";
    GateUp Fp8 3: 32 false "dense_pair_fp8_t32_p3";
};

impl Variant {
    fn of(shape: &DenseShape, tokens: usize) -> &'static Self {
        let fits = |variant: &&Self| {
            (variant.layout, variant.format, variant.planes) == (shape.layout, shape.format, shape.planes)
        };
        let found = VARIANTS.iter().filter(fits).find(|variant| variant.tokens >= tokens);
        let found = found.or_else(|| VARIANTS.iter().rfind(fits));
        found.unwrap_or_else(|| panic!("dense: {} planes; 1 or 3 are possible", shape.planes))
    }

    fn rows(&self) -> usize {
        if self.wide { 2 * ROWS } else { ROWS }
    }

    fn shared_bytes(&self) -> usize {
        let fp8 = self.format == DenseFormat::Fp8;
        let columns = if fp8 && !self.wide { 128 } else { 64 };
        let weights = self.rows() * columns * if fp8 { 1 } else { 2 };
        let scales = if fp8 { 4 * self.rows() } else { 0 };
        let stage = weights + 2 * self.planes * self.tokens * columns + scales;
        stage * (SHARED_BUDGET / stage).min(MOST_STAGES)
    }
}

impl DenseShape {
    /// Weight rows per output.
    fn weights(&self) -> usize {
        if self.layout == DenseLayout::GateUp { 2 } else { 1 }
    }

    /// Terms of a sum that are added up before they are added to the others: a function of the weight alone, so
    /// that a token's sums have one order whatever tokens stand beside it and whatever the device is.
    pub fn piece(&self) -> usize {
        let chunks = self.columns.div_ceil(SCALE_BLOCK);
        if self.layout == DenseLayout::Transposed {
            // Heads may begin anywhere in a block of scales. One more holds what that shifts.
            return (chunks + 1) * SCALE_BLOCK;
        }
        let blocks = (self.rows * self.weights()).div_ceil(ROWS) * self.heads;
        // Pieces of less than 256 would cost more to add than they gain.
        let pieces = RESIDENT_BLOCKS.div_ceil(blocks).clamp(1, (chunks / 2).max(1));
        chunks.div_ceil(pieces) * SCALE_BLOCK
    }

    /// The launch for so many tokens. The number of multiprocessors may change its shape, but no sum.
    pub(super) fn plan(&self, tokens: usize, multiprocessors: u32) -> Plan {
        let variant = Variant::of(self, tokens);
        let piece = self.piece();
        let row_blocks = (self.rows * self.weights()).div_ceil(variant.rows());
        let blocks = row_blocks * tokens.div_ceil(variant.tokens);
        let all = blocks * self.heads;
        // Where there are tokens enough to fill the device, a block takes all pieces.
        let many = variant.wide || (tokens > variant.tokens && all * 2 >= multiprocessors as usize);
        let pieces = match self.columns.div_ceil(piece) {
            _ if self.layout == DenseLayout::Transposed => 1,
            pieces if !many => pieces,
            pieces if all * 2 < multiprocessors as usize && all * pieces <= MOST_WIDE_PARTS => pieces,
            _ => 1,
        };
        let grid = [blocks, pieces, self.heads].map(|n| u32::try_from(n).expect("a grid of less than 2^32"));
        let sums = all * pieces * variant.rows() * variant.tokens;
        Plan {
            kernel: Kernel::new("dense", variant.name),
            grid: (grid[0], grid[1], grid[2]),
            threads: if variant.wide { 256 } else { 128 },
            shared_bytes: variant.shared_bytes(),
            piece,
            workspace: match pieces {
                1 => DenseWorkspaceSize::default(),
                _ => DenseWorkspaceSize { sums, counters: all },
            },
        }
    }

    /// The workspace of any launch for up to `tokens` tokens on a device of so many multiprocessors.
    pub fn workspace_size(&self, tokens: usize, multiprocessors: u32) -> DenseWorkspaceSize {
        // Between the sizes of blocks more tokens take more, until there are so many that nothing is shared.
        let steps = (0..=tokens).step_by(32).chain([1, 8, 9, 16, 17, tokens]);
        let sizes =
            steps.filter(|n| (1..=tokens).contains(n)).map(|n| self.plan(n, multiprocessors).workspace);
        sizes.fold(DenseWorkspaceSize::default(), DenseWorkspaceSize::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(layout: DenseLayout, rows: usize, columns: usize) -> DenseShape {
        DenseShape { format: DenseFormat::Bf16, layout, rows, columns, heads: 1, planes: 1 }
    }

    #[test]
    fn k_is_cut_where_rows_do_not_fill_a_device() {
        let cut = |layout, rows, columns| {
            let shape = shape(layout, rows, columns);
            let plan = shape.plan(1, 132);
            (plan.piece, plan.grid.0 * plan.grid.1)
        };
        // Kimi K2: q_a and kv_a, q_b, o, down and gate with up of the shared expert, router, head.
        assert_eq!(cut(DenseLayout::Rows, 2112, 7168), (896, 264));
        assert_eq!(cut(DenseLayout::Rows, 12288, 1536), (768, 384));
        assert_eq!(cut(DenseLayout::Rows, 7168, 8192), (2816, 336));
        assert_eq!(cut(DenseLayout::Rows, 7168, 2048), (768, 336));
        assert_eq!(cut(DenseLayout::GateUp, 2048, 7168), (1536, 320));
        assert_eq!(cut(DenseLayout::Rows, 384, 7168), (256, 168));
        assert_eq!(cut(DenseLayout::Rows, 163_840, 7168), (7168, 2560));
        // Nothing to cut.
        assert_eq!(cut(DenseLayout::Rows, 32, 40), (128, 1));
    }

    #[test]
    fn the_piece_does_not_know_the_tokens_and_the_workspace_covers_them() {
        for (rows, columns) in [(2112, 7168), (384, 7168), (37, 1000), (7168, 8192)] {
            for planes in [1, 3] {
                for format in [DenseFormat::Bf16, DenseFormat::Fp8] {
                    let shape = DenseShape { format, planes, ..shape(DenseLayout::Rows, rows, columns) };
                    let most = shape.workspace_size(600, 132);
                    for tokens in 1..=600 {
                        let plan = shape.plan(tokens, 132);
                        assert_eq!(plan.piece, shape.piece());
                        assert!(plan.shared_bytes <= SHARED_BUDGET);
                        assert_eq!(plan.workspace.max(most), most, "{shape:?} {tokens}");
                        assert!(most.sums * 4 <= 65 << 20, "{most:?}");
                    }
                }
            }
        }
    }
}
