//! Copies of rows: with and without an index, between rows of different lengths.

use kernels::cuda::{Gather, Strided};

use crate::mock;

#[test]
fn rows_go_where_they_belong() {
    mock::in_every_order(|device| {
        let from: Vec<f32> = (0..7 * 300).map(|i| i as f32).collect();
        let source = device.upload(&from).unwrap();
        let to = device.upload(&vec![-1f32; 5 * 400]).unwrap();
        let index = device.upload(&[6, 0, -1, 6, 3]).unwrap();
        let gather = Gather {
            from: Strided::new(source.slice(10..), 300),
            from_rows: 7,
            index: Some(index.all()),
            to: Strided::new(to.slice(20..), 400),
            rows: 5,
            width: 257,
        };
        gather.launch(device).unwrap();
        let got = to.read().unwrap();
        for (row, &index) in [6, 0, -1, 6, 3].iter().enumerate() {
            for column in 0..400 {
                let inside = index >= 0 && (20..277).contains(&column);
                let want = if inside { (index * 300 + column + 10 - 20) as f32 } else { -1.0 };
                assert_eq!(got[row * 400 + column as usize], want, "row {row} column {column}");
            }
        }
        // Without an index: the second row of two is the second.
        let (from, to) = (Strided::new(source.all(), 300), Strided::new(to.all(), 2));
        Gather { from, from_rows: 7, index: None, to, rows: 2, width: 2 }.launch(device).unwrap();
        assert_eq!(to.values.slice(..4).read().unwrap(), [0.0, 1.0, 300.0, 301.0]);
    });
}
