//! Finalize against a chain of f32 in the order that is promised, bit by bit, and against the f64 reference.

use kernels::cuda::Finalize;
use kernels::reference;

use crate::common::{Random, assert_close_overall, bits};
use crate::mock;

#[test]
fn ranks_are_added_in_order() {
    mock::in_every_order(|device| {
        let mut random = Random(81);
        for hidden in mock::thinned([1, 30, 32, 66, 512, 1028, 7168], 2) {
            for top_k in [1, 4, 8, 11, 16] {
                let (rows, tokens) = (4, 3);
                let (x, shared) = (random.values(rows * hidden), random.values(rows * hidden));
                let mut out = random.values(rows * top_k * hidden);
                // What nobody computed for the padding.
                out[tokens * top_k * hidden..].fill(f32::NAN);
                let weights = random.values(rows * top_k);
                let out_on_device = device.upload(&out).unwrap();
                let weights_on_device = device.upload(&weights).unwrap();
                let shared_on_device = device.upload(&shared).unwrap();
                let count = device.upload(&[tokens as u32]).unwrap();
                for (add, with_shared) in [(true, true), (true, false), (false, true), (false, false)] {
                    let x_on_device = device.upload(&x).unwrap();
                    let finalize = Finalize {
                        x: x_on_device.all(),
                        add,
                        shared: with_shared.then(|| shared_on_device.all()),
                        out: out_on_device.all(),
                        weights: weights_on_device.all(),
                        tokens: Some(count.all()),
                        rows,
                        top_k,
                        hidden,
                    };
                    finalize.launch(device).unwrap();
                    let got = x_on_device.read().unwrap();
                    let mut chain = x.clone();
                    for (i, value) in chain[..tokens * hidden].iter_mut().enumerate() {
                        let (token, column) = (i / hidden, i % hidden);
                        let mut sum = if add { *value } else { 0.0 };
                        if with_shared {
                            sum += shared[i];
                        }
                        for pair in token * top_k..(token + 1) * top_k {
                            sum = weights[pair].mul_add(out[pair * hidden + column], sum);
                        }
                        *value = sum;
                    }
                    assert_eq!(
                        bits(&got),
                        bits(&chain),
                        "{hidden} columns, top {top_k}, {add} {with_shared}"
                    );
                    let n = tokens * top_k;
                    let want = reference::finalize(
                        add.then_some(&x[..]),
                        with_shared.then_some(&shared[..]),
                        &out[..n * hidden],
                        &weights[..n],
                        (top_k, hidden),
                    );
                    assert_close_overall(&got[..tokens * hidden], &want, 1e-6, "finalize");
                }
            }
        }
    });
}
