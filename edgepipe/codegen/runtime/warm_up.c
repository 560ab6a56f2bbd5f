/* Has an engine optimise the kernels. They do nothing: no buffer is looked at. */
API void @prefix@_warm_up(void) {
@warm_ups@
}
