//! A matrix of codes.

/// `[rows, cols]` codes, whose rows begin `pitch` codes apart.
#[derive(Clone, Copy)]
pub struct Codes<'a> {
    pub codes: &'a [i8],
    pub rows: usize,
    pub cols: usize,
    pub pitch: usize,
}

impl<'a> Codes<'a> {
    /// A row.
    pub fn row(&self, row: usize) -> &'a [i8] {
        &self.codes[row * self.pitch..][..self.cols]
    }

    /// What 128 more in each code of the other factor adds to the sums of each row.
    pub fn offsets(&self) -> Vec<i32> {
        let sum = |row: &[i8]| row.iter().map(|&code| i32::from(code)).sum::<i32>();
        (0..self.rows).map(|row| sum(self.row(row)).wrapping_mul(128)).collect()
    }
}
