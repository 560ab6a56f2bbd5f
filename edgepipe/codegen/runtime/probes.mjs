// The smallest module that uses an extension: engines without it refuse the bytes, and some that
// take them compute something else.
const PROBES = {
  // (func (export "f") (result i32) (i32x4.extract_lane 0 (i32x4.relaxed_dot_i8x16_i7x16_add_s
  //   (i8x16.splat -128) (i8x16.splat 127) (i32x4.splat 1))))
  relaxed: () => {
    const code = Uint8Array.of(
      0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 127, 3, 2, 1, 0, 7, 5, 1, 1, 102, 0, 0, 10,
      24, 1, 22, 0, 65, 128, 127, 253, 15, 65, 255, 0, 253, 15, 65, 1, 253, 17, 253, 147, 2, 253,
      27, 0, 11,
    );
    if (!WebAssembly.validate(code)) return false;
    const { f } = new WebAssembly.Instance(new WebAssembly.Module(code)).exports;
    // Kernels without 8-bit products do not mind how these are summed.
    return !@dot_products@ || f() === 1 - 4 * 128 * 127;
  },
};
